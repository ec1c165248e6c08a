"""The Python API on the demo model: what a user of vLLM expects of `LLM`."""

import dataclasses
import gc
import json

import jax
import pytest

from jaxserve import LLM, InputError, SamplingParams, StructuredOutputsParams
from jaxserve.progress import ProgressBars
from tests.server.cases import TOOLS, WEATHER_ARGUMENTS, WEATHER_ASKED

SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "page_size": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def llm():
    with LLM(**SETTINGS, progress=False) as llm:
        yield llm


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat_prompt(llm: LLM, text: str) -> dict:
    return llm.render_chat(ask(text))


def test_the_demo_model_is_the_default_and_answers(llm):
    first, second = llm.chat([ask("What is 27+45?"), ask("What is the capital of France?")], GREEDY)
    assert "72" in first.outputs[0].message["content"]
    assert "Paris" in second.outputs[0].text
    assert first.finished
    assert first.outputs[0].finish_reason == "stop"
    assert first.outputs[0].stop_reason is None


def test_thinking_is_switched_by_the_chat_template(llm):
    thinking = llm.chat(ask("What is 12+30?"), GREEDY)[0].outputs[0].text
    direct = llm.chat(ask("What is the capital of France?"), GREEDY, chat_template_kwargs={"enable_thinking": False})
    assert thinking.startswith("<think>")
    assert "<think>" not in direct[0].outputs[0].text


def test_a_chats_answer_is_a_message_to_go_on_with(llm):
    question = ask("What is 12+30?")
    (output,) = llm.chat(question, GREEDY)[0].outputs
    assert "42" in output.message["content"]
    assert output.message["reasoning_content"] in output.text
    assert "think>" not in str(output.message)
    again = llm.chat([*question, output.message, *ask("What is the capital of France?")], GREEDY)[0].outputs[0]
    assert "Paris" in again.message["content"]
    assert llm.generate(llm.render_chat(question), GREEDY)[0].outputs[0].message is None
    untold = dataclasses.replace(GREEDY, detokenize=False)
    assert llm.chat(question, untold)[0].outputs[0].message is None


def test_a_streamed_chat_adds_up_to_the_whole(llm):
    asked, tools = [WEATHER_ASKED], TOOLS
    (whole,) = llm.chat(asked, GREEDY, tools=tools)[0].outputs
    deltas = [delta.outputs[0] for delta in llm.stream_chat(asked, GREEDY, tools=tools)]
    assert "".join(delta.text for delta in deltas) == whole.text
    reasoning = [delta.message["reasoning_content"] for delta in deltas if "reasoning_content" in delta.message]
    assert "".join(reasoning) == whole.message["reasoning_content"]
    calls = [call for delta in deltas for call in delta.message.get("tool_calls", [])]
    (call,) = whole.message["tool_calls"]
    assert calls[0]["function"]["name"] == call["function"]["name"] == "get_weather"
    arguments = "".join(part["function"].get("arguments", "") for part in calls)
    assert arguments == call["function"]["arguments"]
    assert json.loads(arguments) == WEATHER_ARGUMENTS


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_a_chat_calls_the_tool_that_it_has_to(llm, choice):
    tools = [{"type": "function", "function": {"name": name}} for name in ("get_time", "get_date")]
    asked: dict = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    (whole,) = llm.chat(ask("What is 27+45?"), GREEDY, **asked)[0].outputs
    (call,) = whole.message["tool_calls"]
    assert call["function"]["name"] in ("get_time", "get_date")[: 1 if isinstance(choice, dict) else 2]
    assert json.loads(call["function"]["arguments"]) == {}
    assert whole.message["content"] is None
    deltas = [delta.outputs[0] for delta in llm.stream_chat(ask("What is 27+45?"), GREEDY, **asked)]
    assert "".join(delta.text for delta in deltas) == whole.text


def test_structured_outputs_bind_a_chats_answer_behind_a_bounded_thought(llm):
    settings = dataclasses.replace(GREEDY, structured_outputs=StructuredOutputsParams(choice=["no", "yes"]))
    free, bounded = (
        llm.chat(ask("What is 27+45?"), dataclasses.replace(settings, thinking_token_budget=budget))[0]
        .outputs[0]
        .message
        for budget in (None, 3)
    )
    assert {free["content"], bounded["content"]} <= {"no", "yes"}
    assert free["reasoning_content"].startswith(bounded["reasoning_content"])
    assert len(bounded["reasoning_content"]) < len(free["reasoning_content"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice asks for a call and there are no tools"),
        (
            {"tool_choice": "sometimes", "tools": [{"type": "function", "function": {"name": "f"}}]},
            "give 'none', 'auto'",
        ),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is no function with a name"),
    ],
)
def test_chat_refuses_tools_and_choices_that_are_none(llm, asked, message):
    with pytest.raises(InputError, match=message):
        llm.chat(ask("Hello"), GREEDY, **asked)


def test_without_sampling_parameters_the_models_own_defaults_serve(llm):
    assert llm.get_default_sampling_params().temperature == 0
    prompt = chat_prompt(llm, "What is 5+6?")
    assert (
        llm.generate(prompt)[0].outputs[0].token_ids
        == llm.generate(prompt, SamplingParams(temperature=0))[0].outputs[0].token_ids
    )


def test_a_stream_adds_up_to_what_generate_gives(llm):
    prompt = chat_prompt(llm, "What is 234+678?")
    whole = llm.generate(prompt, GREEDY)[0]
    deltas = list(llm.stream(prompt, GREEDY))
    assert 1 < len(deltas) <= len(whole.outputs[0].token_ids)
    assert all(delta.outputs[0].token_ids for delta in deltas)
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].outputs[0].finish_reason == "stop"


def test_two_streams_and_a_batch_share_the_engine(llm):
    prompts = [chat_prompt(llm, f"What is {n}+45?") for n in (1, 2, 3)]
    alone = [output.outputs[0].text for output in llm.generate(prompts, GREEDY)]
    first, second = llm.stream(prompts[0], GREEDY), llm.stream(prompts[1], GREEDY)
    texts = [next(first).outputs[0].text, next(second).outputs[0].text]
    assert llm.generate(prompts[2], GREEDY)[0].outputs[0].text == alone[2]
    texts[0] += "".join(delta.outputs[0].text for delta in first)
    texts[1] += "".join(delta.outputs[0].text for delta in second)
    assert texts == alone[:2]


def test_leaving_a_stream_frees_its_pages_at_once(llm):
    stream = llm.stream(chat_prompt(llm, "What is 234+678?"), GREEDY)
    next(stream)
    assert llm.engine.pool.num_available < llm.engine.pool.num_pages
    stream.close()
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages
    assert not llm.engine.has_unfinished


def test_a_stop_string_ends_the_text_before_it(llm):
    prompt = chat_prompt(llm, "What is 27+45?")
    whole = llm.generate(prompt, GREEDY)[0].outputs[0].text
    stopped = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=200, stop="</think>"))[0].outputs[0]
    assert stopped.text == whole.split("</think>")[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "</think>")


def test_a_stop_token_ends_the_completion_and_is_named(llm):
    prompt = chat_prompt(llm, "What is 27+45?")
    tokens = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
    stopped = llm.generate(prompt, SamplingParams(temperature=0, stop_token_ids=[tokens[5]]))[0].outputs[0]
    assert stopped.token_ids == tokens[: tokens.index(tokens[5]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[5])


def test_max_tokens_min_tokens_and_ignore_eos_bound_the_length(llm):
    prompt = chat_prompt(llm, "What is the capital of France?")
    natural = llm.generate(prompt, GREEDY)[0].outputs[0]
    longer = len(natural.token_ids) + 7

    def length(**settings) -> tuple[int, str]:
        output = llm.generate(prompt, SamplingParams(temperature=0, **settings))[0].outputs[0]
        return len(output.token_ids), output.finish_reason

    assert length(max_tokens=3) == (3, "length")
    assert length(max_tokens=longer, ignore_eos=True) == (longer, "length")
    assert length(max_tokens=200, min_tokens=longer)[0] >= longer


def test_without_max_tokens_a_completion_goes_to_the_models_limit(llm):
    output = llm.generate(
        {"prompt_token_ids": [5] * 500}, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    )[0]
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"


def test_logprobs_come_in_vllms_shapes(llm):
    prompt = chat_prompt(llm, "Hello!")
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=1))[0]
    completion = output.outputs[0]
    assert len(completion.logprobs) == len(completion.token_ids)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].rank == 1
        assert len(entry) == 2
        assert entry[token].decoded_token == llm.get_tokenizer().decode([token])
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token in entry


def test_prompt_logprobs_agree_with_the_logprobs_of_the_same_tokens_as_output(llm):
    prompt = chat_prompt(llm, "What is 27+45?")["prompt_token_ids"]
    output = llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=60, logprobs=0))[
        0
    ].outputs[0]
    scored = llm.generate(
        {"prompt_token_ids": prompt + output.token_ids}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    )[0]
    expected = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    found = [
        entry[token].logprob
        for token, entry in zip(output.token_ids, scored.prompt_logprobs[len(prompt) :], strict=True)
    ]
    assert found == pytest.approx(expected, abs=0.05)  # bfloat16, in batches of other shapes


def test_sampling_parameters_may_differ_from_prompt_to_prompt(llm):
    prompts = [chat_prompt(llm, "Hello!")] * 2
    one, two = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2)])
    assert (len(one.outputs[0].token_ids), len(two.outputs[0].token_ids)) == (1, 2)
    with pytest.raises(InputError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(prompts, [GREEDY])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ("", "the prompt is empty"),
        ({"prompt_token_ids": [7] * 512}, "512 tokens and max_model_len is 512"),
        ({"prompt_token_ids": [7, 1280]}, r"1280; this model's token ids are the integers from 0 to 1279"),
        ({"prompt_token_ids": [7, -1]}, "-1; this model's token ids"),
        ({"prompt_token_ids": [7, True]}, "True; this model's token ids"),
        ({"prompt_tokens": [7]}, "did you mean 'prompt_token_ids'"),
        ({1: 2}, r"a prompt has the keys \[1\]; give either"),
        (7, "a prompt is of type int"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_and_nothing_is_lost(llm, prompt, message):
    good = chat_prompt(llm, "What is 27+45?")
    with pytest.raises(InputError, match=message):
        llm.generate([good, prompt], GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages
    assert "72" in llm.generate(good, GREEDY)[0].outputs[0].text


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda llm: llm.generate(5), "prompts is of type int; give one, or a list"),
        (lambda llm: llm.stream(5), "a prompt is of type int; give a string"),
        (lambda llm: llm.embed(None), "prompts is of type NoneType"),
        (lambda llm: llm.score(5, "x"), "prompts is of type int"),
        (lambda llm: llm.score("x", ["y", 5]), "a text to score is of type int; give strings"),
        (lambda llm: llm.chat(5), "messages is of type int; give a list of messages, or a list of such lists"),
        (lambda llm: llm.chat({"role": "user", "content": "x"}), "messages is of type dict"),
        (lambda llm: llm.chat([ask("x"), 5]), "messages is of type int; give a list of messages"),
        (lambda llm: llm.stream_chat(5), "messages is of type int"),
        (lambda llm: llm.render_chat(5), "messages is of type int"),
        (lambda llm: llm.chat(ask("x"), tools=5), "tools is of type int; give a list"),
        (lambda llm: llm.chat(ask("x"), chat_template_kwargs=5), "chat_template_kwargs is of type int; give a dict"),
        (lambda llm: llm.chat(ask("x"), chat_template_kwargs={"tools": []}), "has 'tools'; give that beside it"),
        (lambda llm: llm.generate("x", {"temperature": 0}), r"sampling_params is .* give SamplingParams\(...\)"),
        (lambda llm: llm.chat(ask("x"), [None]), "sampling_params is None; give SamplingParams"),
        (lambda llm: llm.stream_chat(ask("x"), 5), "sampling_params is 5; give SamplingParams"),
        (lambda llm: llm.generate(["x", "y"], priority=[1, "a"]), "priority is 'a'; give an integer"),
    ],
)
def test_what_is_of_another_type_is_refused_by_name(llm, use, message):
    with pytest.raises(InputError, match=message):
        use(llm)
    assert not llm.engine.has_unfinished


def test_bars_are_switched_off_as_in_vllm(llm, monkeypatch):
    shown = []

    class Bars(ProgressBars):
        def __init__(self, *, enabled):
            shown.append(enabled)
            super().__init__(enabled=enabled)

    monkeypatch.setattr("jaxserve.llm.ProgressBars", Bars)
    monkeypatch.setattr(llm, "_progress", True)
    short = SamplingParams(max_tokens=1)
    for options in ({}, {"use_tqdm": False}):
        llm.generate("Hello", short, **options)
        llm.chat(ask("Hello"), short, **options)
        llm.embed("Hello", **options)
        llm.score("Hello", " world", **options)
    assert shown == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logprobs": 21}, "logprobs is 21, and this engine was started with max_logprobs=20"),
        ({"logit_bias": {1280: 1.0}}, "logit_bias holds 1280"),
        ({"stop_token_ids": [1280]}, "stop_token_ids holds 1280"),
        ({"stop_token_ids": list(range(20, 40))}, "at most 16 are possible"),
    ],
)
def test_settings_that_this_model_cannot_honour_are_refused(llm, settings, message):
    with pytest.raises(InputError, match=message):
        llm.generate("Hello", SamplingParams(**settings))


@pytest.mark.parametrize(
    "use",
    [
        lambda llm, text: llm.generate(text),
        lambda llm, text: llm.chat(ask(text)),
        lambda llm, text: llm.chat(ask("Hello"), tools=[{"type": "function", "function": {"name": text}}]),
        lambda llm, text: llm.embed(text),
        lambda llm, text: llm.score("Hello", text),
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is_tokenised(llm, use):
    with pytest.raises(InputError, match="holds half a surrogate pair, which is no character"):
        use(llm, "a\udcff")


def test_chat_refuses_what_the_template_cannot_render(llm):
    with pytest.raises(InputError, match="messages is empty"):
        llm.chat([[]], GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_length": 10}, "no setting 'max_model_length'; did you mean 'max_model_len'"),
        ({"max_model_len": 10**6}, "max_model_len=1000000 is more than the"),
        ({"max_model_len": 512, "num_pages": 3}, "holds 192 tokens .* max_model_len is 512"),
        ({"tensor_parallel_size": 16}, "tensor_parallel_size=16"),
        ({"dtype": "int3"}, "dtype is 'int3'; give one of"),
        ({"attention_backend": "mosaic_gpu"}, "attention_backend='mosaic_gpu' is for Hopper GPUs and this is cpu"),
        ({"model": "/no/such/place"}, "no model directory /no/such/place"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; give an integer from 1 on"),
        ({"num_pages": 10**8}, r"num_pages=100000000 and max_num_seqs=32 take [\d.]+ GiB .* and there are"),
        ({"max_num_seqs": 3 * 10**7}, r"and max_num_seqs=30000000 take [\d.]+ GiB .* and there are"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        LLM(**settings, progress=False)


def test_a_closed_engine_says_that_it_is_closed():
    with LLM(**SETTINGS, progress=False) as llm:
        streams = llm.stream("Hello", GREEDY)
        next(streams)
        state = llm.state
    uses = [
        lambda: next(streams),
        lambda: llm.generate("Hello"),
        lambda: llm.chat(ask("Hello")),
        lambda: next(llm.stream("Hello")),
        lambda: llm.embed("Hello"),
        lambda: llm.score("Hello", " world"),
        lambda: llm.update_weights(state),
        lambda: llm.state,
    ]
    for use in uses:
        with pytest.raises(InputError, match="the engine is closed"):
            use()
    llm.close()


def test_leaving_the_context_frees_every_array():
    gc.collect()
    before = len(jax.live_arrays())
    with LLM(**SETTINGS, progress=False) as llm:
        llm.generate("Hello", SamplingParams(max_tokens=2))
        assert len(jax.live_arrays()) > before
    gc.collect()
    assert len(jax.live_arrays()) == before
