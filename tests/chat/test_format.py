"""How a model speaks is told from its template and its tokenizer."""

from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxserve.chat.events import CallArguments, CallBegin, Content, Reasoning
from jaxserve.chat.format import ChatFormat
from jaxserve.chat.tools import Tools
from jaxserve.config import DEMO_MODEL
from jaxserve.errors import InputError

USER = {"role": "user", "content": "What is 2+3?"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
PLAIN = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}{{ tools }}{% endif %}{% if reasoning_effort %}<|start|>system<|message|>Reasoning: "
    "{{ reasoning_effort }}<|end|>{% endif %}<|start|>assistant{# <|channel|> #}"
)


def made_tokenizer(template: str | None, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes, with these tokens beside."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<|user|>", "<|assistant|>", *special)])
    made.add_tokens([AddedToken(token) for token in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def parsed(format: ChatFormat, tokenizer: Any, text: str, *, tools: bool = True, **rendered: Any) -> list[Any]:
    tools_given = [TOOL] if tools else None
    prompt = tokenizer.encode(format.render([USER], tools=tools_given, **rendered), add_special_tokens=False)
    parser = format.parser(prompt, tools=Tools.of(tools_given))
    return [*parser.push(text), *parser.finish()]


@pytest.mark.parametrize(
    ("template", "special", "added", "styles"),
    [
        (PLAIN, (), (), ("none", "none")),
        (PLAIN, (), ("<think>", "</think>"), ("qwen3", "none")),
        (PLAIN + "<think>\n{# </think> #}", (), (), ("qwen3", "none")),
        (PLAIN + "{{ '<tool_call>' }}{{ tools }}", (), (), ("none", "hermes")),
        (PLAIN + "{{ '<tool_call><function=' }}{{ tools }}", (), (), ("none", "none")),
        (PLAIN + "{{ tools }}", ("[TOOL_CALLS]", "[THINK]", "[/THINK]"), (), ("mistral", "mistral")),
        (PLAIN + "{{ tools }}", ("<|python_tag|>",), (), ("none", "llama3_json")),
        (CHANNELS, HARMONY, (), ("openai_gptoss", "openai")),
        (None, (), (), ("none", "none")),
    ],
)
def test_styles_are_detected(template: str | None, special: Any, added: Any, styles: tuple[str, str]):
    format = ChatFormat(made_tokenizer(template, special, added))
    assert (format.reasoning_parser, format.tool_call_parser) == styles


def test_the_demo_models_styles(demo_tokenizer: Any):
    format = ChatFormat(demo_tokenizer)
    assert (format.reasoning_parser, format.tool_call_parser) == ("qwen3", "hermes")
    assert not format.needs_special_tokens(tools=True)


def test_styles_may_be_given_by_name():
    tokenizer = made_tokenizer(PLAIN + "{{ tools }}")
    format = ChatFormat(tokenizer, reasoning_parser="deepseek_r1", tool_call_parser="hermes")
    text = '<think>x</think><tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parsed(format, tokenizer, text)[0] == Reasoning("x")
    off = ChatFormat(tokenizer, reasoning_parser="none", tool_call_parser="none")
    assert parsed(off, tokenizer, text) == [Content(text)]
    with pytest.raises(InputError, match="belong together"):
        ChatFormat(tokenizer, reasoning_parser="openai_gptoss", tool_call_parser="hermes")


def test_reasoning_begins_where_the_prompt_opens_it(demo_tokenizer: Any):
    text = "2+3=5\n</think>\n\n5"
    opened = made_tokenizer(PLAIN + "<think>\n", (), ("<think>", "</think>"))
    assert parsed(ChatFormat(opened), opened, text, tools=False) == [Reasoning("2+3=5"), Content("5")]
    # Not where the user speaks of the tag, nor where the template has closed it.
    asked = {"role": "user", "content": "What does <think> mean?"}
    format = ChatFormat(demo_tokenizer)
    for messages, rendered in (([asked], {}), ([USER], {"enable_thinking": False})):
        prompt = demo_tokenizer.encode(format.render(messages, **rendered), add_special_tokens=False)
        assert format.parser(prompt).push("An answer.") == [Content("An answer.")]


def test_reasoning_tokens_are_counted(demo_tokenizer: Any):
    format = ChatFormat(demo_tokenizer)
    prompt = demo_tokenizer.encode(format.render([USER]), add_special_tokens=False)
    thought = demo_tokenizer.encode("<think>\n2+3=5\n</think>", add_special_tokens=False)
    answer = demo_tokenizer.encode("\n\n5", add_special_tokens=False)
    for cut in range(len(thought + answer)):
        parser = format.parser(prompt)
        for token_ids in ((thought + answer)[:cut], (thought + answer)[cut:]):
            parser.push("", token_ids)
        assert parser.num_reasoning_tokens == len(thought)
    parser = format.parser(prompt)
    parser.push("", answer)
    assert parser.num_reasoning_tokens == 0


def test_channels_are_read_with_the_special_tokens_that_are_their_marks():
    tokenizer = made_tokenizer(CHANNELS, HARMONY)
    format = ChatFormat(tokenizer)
    assert format.needs_special_tokens(tools=False)
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>5<|user|>"
    assert parsed(format, tokenizer, text, tools=False) == [Reasoning("Hm."), Content("5")]
    call = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2}'
    begin, arguments = parsed(format, tokenizer, call)
    assert isinstance(begin, CallBegin)
    assert (begin.name, arguments) == ("add", CallArguments(0, '{"a": 2}'))
    parser = format.parser(tokenizer.encode("<|start|>assistant"))
    parser.push("", tokenizer.encode(text))
    assert parser.num_reasoning_tokens == len("Hm.")


@pytest.mark.parametrize("kept", [False, True])
def test_other_special_tokens_are_left_out_unless_wanted(kept: bool):
    tokenizer = made_tokenizer(PLAIN + "{{ tools }}", ("[TOOL_CALLS]", "</s>"))
    format = ChatFormat(tokenizer)
    assert format.needs_special_tokens(tools=True)
    assert not format.needs_special_tokens(tools=False)
    parser = format.parser(tokenizer.encode("<|assistant|>"), tools=Tools.of([TOOL]), skip_special_tokens=not kept)
    assert parser.push("Yes.</s>") + parser.finish() == [Content("Yes.</s>" if kept else "Yes.")]


def test_mistrals_ids_are_nine_letters_and_digits():
    tokenizer = made_tokenizer(PLAIN + "{{ tools }}", ("[TOOL_CALLS]", "[ARGS]"))
    begin, _ = parsed(ChatFormat(tokenizer), tokenizer, "[TOOL_CALLS]add[ARGS]{}")
    assert len(begin.id) == 9
    assert begin.id.isalnum()


def effort(format: ChatFormat, value: str) -> str:
    return format.render([USER], reasoning_effort=value)


def test_reasoning_effort_is_what_the_template_understands(demo_tokenizer: Any):
    demo = ChatFormat(demo_tokenizer)
    assert effort(demo, "none") == demo.render([USER], enable_thinking=False) != demo.render([USER])
    with pytest.raises(InputError, match=r"reasoning_effort is 'low', .*; give 'none', or leave it out"):
        effort(demo, "low")
    channels = ChatFormat(made_tokenizer(CHANNELS, HARMONY))
    assert "Reasoning: low" in effort(channels, "low")
    with pytest.raises(InputError, match=r"'none', .* give one of 'low', 'medium', 'high', or leave it out"):
        effort(channels, "none")
    plain = ChatFormat(made_tokenizer(PLAIN))
    assert effort(plain, "none") == plain.render([USER])  # it does not think
    with pytest.raises(InputError, match=r"reasoning_effort is 'high'.*; leave it out"):
        effort(plain, "high")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"enable_thinkin": False}, "chat_template_kwargs has 'enable_thinkin', .* did you mean 'enable_thinking'"),
        ({"chat_template": "{{ 1 }}"}, "chat_template_kwargs has 'chat_template'"),
        ({"tokenize": True}, "chat_template_kwargs has 'tokenize'"),
        ({"documents": [{"text": "x"}]}, "documents is given, and this model's chat template knows none"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "both set"),
        ({"continue_final_message": True, "messages": [USER | {"content": ["x"]}]}, "needs a last message"),
        ({"messages": []}, "messages is empty"),
    ],
)
def test_what_the_template_does_not_know_is_refused(given: dict[str, Any], told: str, demo_tokenizer: Any):
    with pytest.raises(InputError, match=told):
        ChatFormat(demo_tokenizer).render(**({"messages": [USER]} | given))


def test_tools_need_a_template_and_a_style():
    with pytest.raises(InputError, match="tools is given, and this model's chat template knows none"):
        ChatFormat(made_tokenizer(PLAIN)).render([USER], tools=[TOOL])
    with pytest.raises(InputError, match="not known how this model calls them; start the engine with tool_call_parser"):
        ChatFormat(made_tokenizer(PLAIN + "{{ tools }}")).render([USER], tools=[TOOL])
    with pytest.raises(InputError, match="has no chat template"):
        ChatFormat(made_tokenizer(None)).render([USER])


def test_a_file_may_take_the_templates_place(tmp_path: Any):
    file = tmp_path / "template.jinja"
    file.write_text("Mine: {{ messages[0].content }}")
    assert ChatFormat(made_tokenizer(PLAIN), chat_template=str(file)).render([USER]) == "Mine: What is 2+3?"
    with pytest.raises(InputError, match="cannot read the chat_template /no/such/file"):
        ChatFormat(made_tokenizer(PLAIN), chat_template="/no/such/file")
