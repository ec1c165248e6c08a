"""Reasoning, content and tool calls are told apart, however the text is cut into pieces."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.chat.events import CallArguments, CallBegin, Content
from jaxserve.chat.parser import whole_answer
from jaxserve.outputs import CompletionOutput
from tests.chat.styles import found, parser

ADD = '{"a": 2, "b": [3, {"c": "}\\"]"}]}'
CALL = f'{{"name": "add", "arguments": {ADD}}}'
TIME = '{"name": "get_time", "arguments": {}}'

# Style, text, and what is found in it: reasoning, content, calls.
CASES: list[tuple[str, str, tuple[str, str, list[tuple[str, str]]]]] = [
    ("hermes", "<think>\n2+3=5\n</think>\n\n5", ("2+3=5", "5", [])),
    ("hermes", "\n <think>a</think>b", ("a", "b", [])),
    ("hermes", "<think>\n\n</think>\n\nPlain.", ("", "Plain.", [])),
    ("hermes", "No thinking <th", ("", "No thinking <th", [])),
    ("hermes", "\nKeeps its line break\n", ("", "\nKeeps its line break\n", [])),
    ("hermes", "<think>cut off\n", ("cut off\n", "", [])),
    ("hermes", "The tag <think> opens and </think> closes", ("", "The tag <think> opens and </think> closes", [])),
    ("hermes", "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>", [])),
    ("hermes", "", ("", "", [])),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", ("", "", [("add", ADD)])),
    ("hermes", f"<think>x</think>\n\nLet me.\n<tool_call>{CALL}", ("x", "Let me.", [("add", ADD)])),
    (
        "hermes",
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{TIME}\n</tool_call>\nDone. ",
        ("", "Done. ", [("add", ADD), ("get_time", "{}")]),
    ),
    ("hermes", f'<tool_call>{{"arguments": {ADD}, "name": "add"}}</tool_call>', ("", "", [("add", ADD)])),
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', ("", "", [("get_time", "{}")])),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", [("add", '{"a": 1}')])),
    ("hermes", '<tool_call>{"id": 7, "name": "f", "arguments": {}}</tool_call>', ("", "", [("f", "{}")])),
    ("hermes", f"<tool_call>{CALL}}}</tool_call>", ("", "", [("add", ADD)])),  # a brace too many
    ("hermes", f"<tool_call>{CALL[:-1]}</tool_call>", ("", "", [("add", ADD)])),  # and one too few
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', ("", "", [("add", '{"a": 1')])),  # cut at its limit
    ("hermes", "x\n<tool_call>add(2, 3)</tool_call>", ("", "x\n<tool_call>add(2, 3)</tool_call>", [])),
    ("hermes", '<tool_call>{"name": "add", "arg', ("", '<tool_call>{"name": "add", "arg', [])),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', ("", '<tool_call>{"name": 5}</tool_call>', [])),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": [1]}}</tool_call>\n<tool_call>{TIME}</tool_call>',
        ("", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', [("get_time", "{}")]),
    ),
    ("llama3_json", f'{{"name": "add", "parameters": {ADD}}}', ("", "", [("add", ADD)])),
    ("llama3_json", f'<|python_tag|>{{"name": "other", "parameters": {ADD}}}', ("", "", [("other", ADD)])),
    ("llama3_json", f" \n{CALL}; {TIME}", ("", "", [("add", ADD), ("get_time", "{}")])),
    ("llama3_json", '{"type": "function", "name": "get_time", "parameters": {}}', ("", "", [("get_time", "{}")])),
    ("llama3_json", '{"name": "Ann", "age": 5}', ("", '{"name": "Ann", "age": 5}', [])),
    ("llama3_json", '{"name": "Ann", "parameters": {}}', ("", '{"name": "Ann", "parameters": {}}', [])),
    ("llama3_json", f"So: {CALL}", ("", f"So: {CALL}", [])),
    ("llama3_json", f"So: \n<|python_tag|>{CALL}", ("", "So:", [("add", ADD)])),
    ("llama3_json", "<|python_tag|>print(1)<|eot_id|>", ("", "print(1)", [])),
    ("mistral", f"[TOOL_CALLS][{CALL}, {TIME}]", ("", "", [("add", ADD), ("get_time", "{}")])),
    ("mistral", f"Hm.\n[TOOL_CALLS] [{CALL}]</s>", ("", "Hm.", [("add", ADD)])),
    (
        "mistral",
        f"[TOOL_CALLS]add[ARGS]{ADD}[TOOL_CALLS]get_time[ARGS]{{}}",
        ("", "", [("add", ADD), ("get_time", "{}")]),
    ),
    ("mistral", f"[TOOL_CALLS]add{ADD}", ("", "", [("add", ADD)])),
    ("mistral", "[TOOL_CALLS] nothing </s>of it", ("", " nothing of it", [])),
    ("mistral", "[TOOL_CALLS][1]", ("", "[1]", [])),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>5<|return|>",
        ("Hm.", "5", []),
    ),
    ("harmony", "<|channel|>final<|message|>Just this", ("", "Just this", [])),
    (
        "harmony",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I call.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{ADD}<|call|>"
        "<|start|>assistant to=functions.get_time<|channel|>commentary<|message|><|call|>",
        ("a\nb", "I call.", [("add", ADD), ("get_time", "{}")]),
    ),
    ("harmony", "<|channel|>analysis<|message|>cut <|en", ("cut <|en", "", [])),
    ("harmony", "<|channel|>anal", ("", "", [])),
    ("harmony", "no channels at all<|endoftext|>", ("", "no channels at all", [])),
]  # fmt: skip


def names(case: Any) -> str:
    return case if isinstance(case, str) and len(case) < 20 else ""


@pytest.mark.parametrize(("style", "text", "expected"), CASES, ids=names)
def test_a_whole_text(style: str, text: str, expected: Any):
    assert found(parser(style), [text]) == expected


@pytest.mark.parametrize(("style", "text", "expected"), CASES, ids=names)
def test_character_by_character(style: str, text: str, expected: Any):
    assert found(parser(style), [*text]) == expected


MARKS = {
    "hermes": ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "_call>"],
    "llama3_json": ["<|python_tag|>", "<|eot_id|>", "<|python", "; "],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[TOOL", "_CALLS]", "add", "</s>", "[", "]", ","],
    "harmony": ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "analysis", "final", " to=functions.add", "<|"],
}
PARTS = ["\n", " ", "a", "{", "}", '"', "\\", '"name": "add"', '"arguments": ', CALL, TIME, "é", "<", ">"]


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A style, and a text made of what means something in it, in pieces."""
    style = draw(st.sampled_from(sorted(MARKS)))
    text = "".join(draw(st.lists(st.sampled_from(MARKS[style] + PARTS), max_size=14)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return style, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(cut_texts(), st.booleans(), st.booleans())
def test_pieces_add_up_to_the_whole(cut: tuple[str, list[str]], inside: bool, tools: bool):
    style, pieces = cut
    options = {"tools": tools} if style == "harmony" else {"inside": inside, "tools": tools}
    assert found(parser(style, **options), pieces) == found(parser(style, **options), ["".join(pieces)])


@given(cut_texts())
def test_what_is_no_call_is_not_lost(cut: tuple[str, list[str]]):
    style, pieces = cut
    reasoning, content, calls = found(parser(style), pieces)
    if style != "harmony" and not calls:
        kept = [character for character in reasoning + content if character in 'é"{}\\']
        assert kept == [character for character in "".join(pieces) if character in 'é"{}\\']


def test_reasoning_that_the_prompt_has_opened():
    assert found(parser("hermes", inside=True), ["2+3", "=5\n</th", "ink>\n\n5"]) == ("2+3=5", "5", [])


def test_without_tools_nothing_is_a_call():
    text = f"<tool_call>{CALL}</tool_call>"
    assert found(parser("hermes", tools=False), [text]) == ("", text, [])
    channel = f"<|channel|>commentary to=functions.add<|message|>{ADD}"
    assert found(parser("harmony", tools=False), [channel]) == ("", ADD, [])


def test_only_the_first_call_where_parallel_ones_are_not_wanted():
    text = f"[TOOL_CALLS][{CALL}, {TIME}]"
    assert found(parser("mistral", max_calls=1), [text]) == ("", "", [("add", ADD)])


def test_a_call_is_told_before_its_arguments_are_complete():
    read = parser("hermes")
    assert read.push('Well.\n<tool_call>{"name": "add", "argu') == [Content("Well.")]
    assert read.push('ments": {"a": ') == [CallBegin(0, "0", "add"), CallArguments(0, '{"a": ')]
    assert read.push("12") == [CallArguments(0, "12")]
    assert read.push("34}}\n</tool_call>") == [CallArguments(0, "34}")]
    assert read.finish() == []


def test_text_is_not_held_back_without_need():
    read = parser("hermes")
    assert read.push("Hello") == [Content("Hello")]
    assert read.push(" <b>you</b> <") == [Content(" <b>you</b>")]
    assert read.push("i>") == [Content(" <i>")]


def test_a_message_that_the_prompt_has_begun_goes_on():
    read = parser("harmony", prompt="assistant<|channel|>final<|message|>The answer")
    assert read.push(" is 5.") == [Content(" is 5.")]


@pytest.mark.parametrize("text", ["\n" * 30_000, "<tool_call>" * 3_000, '<tool_call>{"name": "' + "x" * 30_000])
def test_long_and_senseless_texts_take_no_long_time(text: str):
    """Each takes well under a second, and would take minutes if all were read again with each character."""
    read = parser("hermes")
    for character in text:
        read.push(character)
    read.finish()


def test_messages_in_openais_shape():
    def message_of(text: str) -> dict[str, Any]:
        return whole_answer(parser("hermes"), CompletionOutput(0, text, finish_reason="stop")).as_message()

    message = message_of(f"<think>x</think><tool_call>{CALL}</tool_call>")
    assert message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "x",
        "tool_calls": [{"id": "0", "type": "function", "function": {"name": "add", "arguments": ADD}}],
    }
    assert json.loads(ADD)
    assert message_of("Hi") == {"role": "assistant", "content": "Hi"}
