"""Structured outputs through the engine, by the demo model: grammars beside free requests, one step ahead."""

import json
import re

import jsonschema
import pytest

from jaxserve import LLM, InputError, SamplingParams, StructuredOutputsParams
from jaxserve.runner.step_batch import DecodeArrays, Needs, StepBatch
from jaxserve.sampling_params import Thinking

SETTINGS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 512, "page_size": 16, "dtype": "float32"}
ONE_AT_A_TIME = SETTINGS | {"max_decode_steps": 1}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    with LLM(**ONE_AT_A_TIME, progress=False) as llm:
        yield llm


def params(max_tokens: int = 100, temperature: float = 1.0, seed: int = 3, **wanted) -> SamplingParams:
    structured = StructuredOutputsParams(**wanted) if wanted else None
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, structured_outputs=structured)


def prompt(llm: LLM, text: str, **arguments) -> dict:
    return llm.render_chat([{"role": "user", "content": text}], **arguments)


def test_whatever_is_sampled_is_what_each_grammar_allows(llm):
    wanted = [
        {"json": PERSON, "disable_any_whitespace": True},
        {"regex": "[A-Z][a-z]{2,5} [0-9]{3}"},
        {"choice": ["red", "green", "blue"]},
        {"grammar": 'start: "(" INNER ")"\nINNER: /[0-9]{1,4}/'},
    ]
    prompts = [prompt(llm, f"What is {n}+{n}?") for n in range(8)]
    outputs = llm.generate(prompts, [params(seed=n, **wanted[n % 4]) for n in range(8)])
    texts = [output.outputs[0].text for output in outputs]
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    for person, word, color, group in (texts[:4], texts[4:]):
        jsonschema.validate(json.loads(person), PERSON)
        assert re.fullmatch("[A-Z][a-z]{2,5} [0-9]{3}", word)
        assert color in ("red", "green", "blue")
        assert re.fullmatch(r"\([0-9]{1,4}\)", group)
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_free_requests_beside_grammars_get_the_tokens_they_get_alone_and_run_in_every_step(llm):
    prompts = [prompt(llm, f"What is {n}+45?") for n in (1, 2, 3, 4)]
    free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = [llm.generate(one, free)[0].outputs[0].token_ids for one in prompts[:2]]
    steps: list[tuple[int, bool]] = []  # rows, and whether any is masked

    def note(batch: StepBatch) -> None:
        if isinstance(batch.arrays, DecodeArrays):
            steps.append((batch.num_rows, bool(batch.arrays.needs & Needs.MASK)))

    llm.engine.on_step = note
    try:
        bound = params(max_tokens=40, regex="[a-z]{200}")
        outputs = llm.generate(prompts, [free, free, bound, bound])
    finally:
        llm.engine.on_step = None
    assert [output.outputs[0].token_ids for output in outputs[:2]] == alone
    # Constrained rows sit out every other step; the free ones are in all of them.
    together = [(rows, masked) for rows, masked in steps if rows > 2]
    assert 15 <= len(together) <= 20
    assert all(masked for _, masked in together)
    assert sum(not masked for rows, masked in steps if rows == 2) >= 15
    assert re.fullmatch("[a-z]{20,}", outputs[2].outputs[0].text)
    assert outputs[2].outputs[0].finish_reason == "length"


def test_hostile_grammars_beside_a_free_request_end_or_go_on_and_take_nothing_from_it(llm):
    free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    one = prompt(llm, "What is 1+45?")
    alone = llm.generate(one, free)[0].outputs[0].token_ids
    hostile = [
        {"regex": "(a+)+b"},
        {"regex": "((a{1,100}){1,100}){1,100}"},
        {"grammar": 'start: a\na: a a | "x"'},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
        {"json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(400)}}},
    ]
    bound = [params(max_tokens=60, seed=n, **wanted) for n, wanted in enumerate(hostile)]
    outputs = llm.generate([one] * 7, [free, *bound])
    assert outputs[0].outputs[0].token_ids == alone
    assert {output.outputs[0].finish_reason for output in outputs[1:]} <= {"stop", "length"}
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_a_grammar_that_takes_too_long_on_the_way_ends_its_request_with_an_error(llm):
    grammar = 'start: a\na: a a | "x"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxserve.engine.constraint._SECONDS", 0.0)
        patch.setattr("jaxserve.engine.constraint._SECONDS_PER_TOKEN", 0.0)
        output = llm.generate(prompt(llm, "Hello"), params(max_tokens=60, grammar=grammar))[0].outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == ("error", 1)
    assert "take too long" in output.stop_reason


def test_a_constrained_requests_tokens_do_not_depend_on_what_runs_beside_it(llm):
    one = prompt(llm, "What is the capital of France?")
    bound = params(json=PERSON, temperature=1.0, seed=9)
    alone = llm.generate(one, bound)[0].outputs[0].token_ids
    others = [prompt(llm, f"What is {n}+45?") for n in range(6)]
    beside = [params(max_tokens=30), params(max_tokens=20, choice=["yes", "no"]), params(max_tokens=25)] * 2
    together = llm.generate([one, *others], [bound, *beside])
    assert together[0].outputs[0].token_ids == alone


def test_completions_of_n_follow_the_grammar_each_in_its_own_way(llm):
    wanted = StructuredOutputsParams(regex="[a-z]{8}")
    sampling = SamplingParams(n=4, temperature=1.5, seed=5, max_tokens=50, structured_outputs=wanted)
    texts = [output.text for output in llm.generate(prompt(llm, "Hello"), sampling)[0].outputs]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
    assert len(set(texts)) > 1


def test_preempted_grammars_go_on_where_they_were():
    with LLM(**SETTINGS, num_pages=33, progress=False) as llm:
        prompts = [prompt(llm, f"What is {n}+{n}?") for n in range(8)]
        bound = [params(max_tokens=90, seed=n, regex="([a-z]{3}-){200}") for n in range(8)]
        outputs = llm.generate(prompts, bound)
        assert llm.engine.scheduler.num_preemptions > 0
        for output in outputs:
            assert re.fullmatch("([a-z]{3}-)*[a-z]{0,3}-?", output.outputs[0].text)


def test_the_grammar_binds_behind_the_thinking_which_is_the_models_own(llm):
    tokenizer = llm.get_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(text) for text in ("<think>", "</think>"))
    wanted = StructuredOutputsParams(regex=r"\n\n\{[0-9]+\}")
    sampling = SamplingParams(
        temperature=0, max_tokens=200, structured_outputs=wanted, thinking=Thinking(start=(start,), end=(end,))
    )
    text = llm.generate(prompt(llm, "What is 27+45?"), sampling)[0].outputs[0].text
    free = llm.generate(prompt(llm, "What is 27+45?"), SamplingParams(temperature=0, max_tokens=200))[0].outputs[0].text
    assert text.split("</think>")[0] == free.split("</think>")[0]
    assert re.fullmatch(r"\n\n\{[0-9]+\}", text.split("</think>")[1])


def test_a_thinking_budget_cuts_the_thinking_and_leaves_the_answer_free(llm):
    tokenizer = llm.get_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(text) for text in ("<think>", "</think>"))
    closing = (*tokenizer.encode("\n"), end)
    thinking = Thinking(start=(start,), end=(end,), budget=5, closing=closing)
    output = llm.generate(
        prompt(llm, "What is 27+45?"), SamplingParams(temperature=0, max_tokens=60, thinking=thinking)
    )[0].outputs[0]
    assert output.token_ids.index(end) == 6 + len(closing) - 1
    assert len(output.token_ids) > 6 + len(closing)


def test_a_schema_that_cannot_be_followed_is_refused_and_nothing_runs(llm):
    with pytest.raises(InputError, match="json cannot be followed"):
        llm.generate([prompt(llm, "Hello")] * 2, [params(), params(json={"type": "strange"})])
    assert not llm.engine.has_unfinished


def test_a_grammar_without_an_end_stops_at_max_tokens(llm):
    output = llm.generate(prompt(llm, "Hello"), params(max_tokens=7, regex="[a-z]{100}"))[0].outputs[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 7


def test_an_answer_in_a_form_follows_even_if_the_model_would_end_within_its_thinking(llm):
    tokenizer = llm.get_tokenizer()
    start, end, over = (tokenizer.convert_tokens_to_ids(text) for text in ("<think>", "</think>", "<|im_end|>"))
    opened = {"prompt_token_ids": [*prompt(llm, "What is 27+45?")["prompt_token_ids"], start]}
    eager = {"temperature": 0, "max_tokens": 60, "logit_bias": {over: 100.0}}
    free = llm.generate(opened, SamplingParams(**eager))[0].outputs[0]
    assert list(free.token_ids) == [over]
    thinking = Thinking(end=(end,), budget=8, closing=(end,))
    bound = SamplingParams(**eager, thinking=thinking, structured_outputs=StructuredOutputsParams(regex="[0-9]{2}"))
    output = llm.generate(opened, bound)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.text[-2:].isdigit()
