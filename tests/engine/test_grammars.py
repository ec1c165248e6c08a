"""Grammars are compiled once, kept within bounds, and refused where they would take too much."""

import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint.tokenizer import load_tokenizer
from jaxserve.config import DEMO_MODEL
from jaxserve.engine import grammars as grammars_module
from jaxserve.engine.constraint import Constraint
from jaxserve.engine.grammars import Grammars
from jaxserve.errors import InputError
from jaxserve.runner.step_batch import mask_words
from jaxserve.sampling_params import ChatGrammar, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

VOCAB = 1280
TOKENIZER = load_tokenizer(DEMO_MODEL)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return SHARED


SHARED = Grammars(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[END])  # hypothesis has no fixtures


def wanted(**form: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**form))


def accepts(grammars: Grammars, params: SamplingParams, text: str) -> bool:
    """Whether `text` is all of what these settings let through."""
    matcher = grammars.compiled(params).deep_copy()
    tokens = TOKENIZER.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


# What is kept


def test_what_has_been_compiled_is_known_and_the_same_the_next_time(grammars: Grammars):
    params = wanted(choice=["once"])
    assert not grammars.knows(params)
    matcher = grammars.compiled(params)
    assert grammars.knows(wanted(choice=("once",)))
    assert grammars.compiled(wanted(choice=["once"])) is matcher


def test_what_has_been_refused_is_known_too(grammars: Grammars):
    params = wanted(regex="(once")
    for known in (False, True):
        assert grammars.knows(params) is known
        with pytest.raises(InputError, match="regex cannot be followed"):
            grammars.compiled(params)


def test_free_settings_need_no_grammar(grammars: Grammars):
    assert grammars.knows(SamplingParams())
    assert grammars.compiled(SamplingParams()) is None


def test_a_name_that_it_was_given_by_is_the_errors_and_nothing_else(grammars: Grammars):
    one, other = wanted(regex="(x", given_as="guided_regex"), wanted(regex="(x")
    for params, name in ((one, "guided_regex"), (other, "regex"), (one, "guided_regex")):
        with pytest.raises(InputError, match=rf"^{name} cannot be followed") as raised:
            grammars.compiled(params)
        assert raised.value.field == (name if name == "guided_regex" else None)


def test_many_grammars_do_not_pile_up_and_those_in_use_stay():
    grammars = Grammars(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[END])
    used = wanted(choice=["in use"])
    grammars.compiled(used)
    for number in range(grammars_module._KEPT + 20):
        grammars.compiled(wanted(choice=[f"number {number}"]))
        assert grammars.knows(used)
    assert len(grammars._kept) == grammars_module._KEPT
    assert not grammars.knows(wanted(choice=["number 0"]))


def test_what_took_long_is_kept_within_a_bound_of_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammars_module, "_KEPT_SECONDS", -1.0)  # some take less than the clock tells
    grammars = Grammars(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[END])
    for text in ("a", "b", "c"):
        grammars.compiled(wanted(choice=[text]))
        assert len(grammars._kept) == 1  # the newest is what its request is about to use
        assert grammars._kept_seconds == pytest.approx(sum(kept.seconds for kept in grammars._kept.values()))


def test_many_threads_get_what_they_ask_for(grammars: Grammars):
    found: dict[int, bool] = {}

    def ask(number: int) -> None:
        found[number] = accepts(grammars, wanted(choice=[f"thread {number % 3}"]), f"thread {number % 3}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(9), True)


# What texts mean


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_choices_are_these_texts_and_no_others(choices: list[str]):
    params = wanted(choice=choices)
    for text in choices:
        assert accepts(SHARED, params, text)
    assert accepts(SHARED, params, choices[0] + "x") == (choices[0] + "x" in choices)


@pytest.mark.parametrize(
    ("regex", "text", "other"),
    [
        ("a/b\nc", "a/b\nc", "a/b c"),
        (r"\d+\.\w{2}", "12.ab", "12,ab"),
        ("(?i)yes|no", "YES", "yesno"),
        ("[^/]+", "x\ny", "x/y"),
        ("é|\N{GRINNING FACE}", "\N{GRINNING FACE}", "e"),
        ("", "", "a"),
    ],
)
def test_a_regular_expression_matches_all_of_the_text(grammars: Grammars, regex: str, text: str, other: str):
    assert accepts(grammars, wanted(regex=regex), text)
    assert not accepts(grammars, wanted(regex=regex), other)


def test_white_space_between_parts_is_bounded_and_can_be_set(grammars: Grammars):
    schema = {"type": "array", "items": {"type": "integer"}}
    assert accepts(grammars, wanted(json=schema), "[1,\n\t 2]")
    assert not accepts(grammars, wanted(json=schema), f"[1,{' ' * 33}2]")
    assert not accepts(grammars, wanted(json=schema, disable_any_whitespace=True), "[1, 2]")
    assert accepts(grammars, wanted(json=schema, disable_any_whitespace=True), "[1,2]")
    assert accepts(grammars, wanted(json=schema, whitespace_pattern="_"), "[1,_2]")


@pytest.mark.parametrize("low", [-2, -1, 0, 1, 49])
def test_the_end_of_an_open_range_is_not_in_it(grammars: Grammars, low: int):
    for end, schema in (
        (low, {"type": "number", "exclusiveMinimum": low, "maximum": low + 0.5}),
        (low, {"type": "number", "exclusiveMaximum": low, "minimum": low - 0.5}),
        (low, {"allOf": [{"type": "number", "exclusiveMinimum": low}, {"maximum": low + 0.5}]}),
    ):
        middle = low - 0.25 if "exclusiveMaximum" in schema else low + 0.25
        assert accepts(grammars, wanted(json=schema), f"{middle}")
        assert not accepts(grammars, wanted(json=schema), f"{end}")


def test_an_empty_schema_is_any_json_and_true_is_as_empty(grammars: Grammars):
    for schema in ({}, "{}", "true"):
        assert accepts(grammars, wanted(json=schema), '{"a": [null, 1.5]}')
        assert not accepts(grammars, wanted(json=schema), "a")


def test_a_special_tokens_name_in_a_text_is_text(grammars: Grammars):
    matcher = grammars.compiled(wanted(choice=["say <think> now"])).deep_copy()
    in_pieces = [token for piece in ("say <", "think", "> now") for token in TOKENIZER.encode(piece)]
    assert matcher.try_consume_tokens(in_pieces) == len(in_pieces)


def test_what_tools_make_of_an_answer_stands_beside_what_its_text_is(grammars: Grammars):
    chat = ChatGrammar('start: "call()" | content')
    both = SamplingParams(chat_grammar=chat, structured_outputs=StructuredOutputsParams(choice=["7"]))
    assert [accepts(grammars, both, text) for text in ("call()", "7", "8")] == [True, True, False]
    assert accepts(grammars, SamplingParams(chat_grammar=chat), "any\ntext")


def test_an_error_beside_tools_is_told_of_what_has_it(grammars: Grammars):
    good, bad = ChatGrammar("start: content"), ChatGrammar("start: content nothing")
    text = StructuredOutputsParams(regex="(a", given_as="structured_outputs.regex")
    for params, field in (
        (SamplingParams(chat_grammar=good, structured_outputs=text), "structured_outputs.regex"),
        (SamplingParams(chat_grammar=bad), "tools"),
        (SamplingParams(chat_grammar=bad, structured_outputs={"regex": "a"}), "tools"),
    ):
        with pytest.raises(InputError, match=rf"^{field} cannot be followed \([^\n]+\); mend it$") as raised:
            grammars.compiled(params)
        assert raised.value.field == field


# What it costs


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


LIST = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}

# Each is compiled within the bounds.
HEAVY = {
    "nested repetition": {"regex": "(a+)+b"},
    "a million repetitions": {"regex": "((a{1,100}){1,100}){1,100}"},
    "a billion repetitions": {"regex": "((ab?c{1,1000}){1,1000}d){1,1000}e"},
    "what could be anywhere": {"regex": "(a|b)*a(a|b){18}"},
    "a recursive schema": {"json": LIST},
    "a schema that has to recurse": {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    "an empty schema": {"json": {}},
    "a huge enum": {"json": {"enum": [f"value number {n}" for n in range(8000)]}},
    "an enum of numbers": {"json": {"enum": [*range(20_000)]}},
    "many choices": {"choice": [f"choice number {n}" for n in range(8000)]},
    "deep nesting": {"json": nested(50)},
    "many items": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "long strings": {"json": {"type": "string", "minLength": 10**9}},
    "many properties": {"json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(500)}}},
    "a pattern": {"json": {"type": "string", "pattern": "(a+)+b"}},
    "a pattern of anything": {"json": {"type": "string", "pattern": "^(.*a){30}b$"}},
    "a fine grid": {"json": {"type": "number", "multipleOf": 0.0000001}},
    "an ambiguous grammar": {"grammar": 'start: a\na: a a | "x"'},
    "a long repetition": {"grammar": 'start: "a"{1,1000000000}'},
    "a grammar of itself": {"grammar": 'root ::= root | "a"'},
}

# Each is refused, with what is wrong.
BEYOND = {
    "an odd grid": ({"json": {"type": "integer", "multipleOf": 3_000_017}}, "it takes more than|it needs too much"),
    "ten thousand properties": (
        {"json": {"type": "object", "properties": {f"p{n}": {} for n in range(10_000)}}},
        "it takes more than|it needs too much",
    ),
    "all of many": (
        {"json": {"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(6)]} for i in range(12)]}},
        "cannot be followed",
    ),
    "ten megabytes": ({"json": json.dumps({"enum": ["x" * 10_000_000]})}, "characters and at most 262144"),
    "deeper nesting": ({"json": nested(500)}, "recursion limit"),
    "nesting without end": ({"json": nested(10_000)}, "is no JSON"),
    "groups without end": ({"regex": "(" * 10_000 + "a" + ")" * 10_000}, "regex cannot be followed"),
    "parentheses without end": ({"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000}, "too deeply"),
    "parentheses in GBNF": ({"grammar": "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000}, "recursion"),
    "nothing": ({"json": ""}, "is no JSON"),
    "a schema that nothing fits": ({"json": {"$ref": "#"}}, "cannot be followed"),
    "a schema of false": ({"json": "false"}, "json is false; give an object"),
    "a document elsewhere": ({"json": {"$ref": "http://example.com/schema.json"}}, "not fetch"),
    "a file": ({"json": {"$ref": "file:///etc/passwd"}}, "not fetch"),
    "numbers without end": ({"json": {"type": "integer", "maximum": 10**400}}, "number out of range"),
    "items without end": ({"json": {"type": "array", "minItems": 10**30}}, "minItems"),
    "one of alike": (
        {"json": {"oneOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]}},
        "oneOf",
    ),
    "an import": ({"grammar": "start: %import nothing"}, "Expected value"),
    "a look around": ({"json": {}, "whitespace_pattern": "(?=a)"}, "regex parse error"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_what_looks_heavy_is_compiled_and_followed_in_bounded_steps(name: str, grammars: Grammars):
    params, chooser = wanted(**HEAVY[name]), random.Random(0)
    constraint = Constraint(grammars.compiled(params), None)
    mask = np.zeros(mask_words(VOCAB), np.uint32)
    for _ in range(100):
        mask[:] = 0
        start = time.thread_time()
        constraint.allow(mask)
        may_follow = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(may_follow):
            break
        constraint.accept(int(chooser.choice(may_follow)))
        assert time.thread_time() - start < 0.5
        if constraint.complete:
            break
    assert constraint.error is None


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_too_much_is_refused_in_one_sentence_and_the_next_is_served(name: str, grammars: Grammars):
    form, told = BEYOND[name]
    start = time.thread_time()
    with pytest.raises(InputError, match=told) as raised:
        grammars.compiled(wanted(**form))
    assert time.thread_time() - start < 1  # nothing of it ran in this process
    assert len(str(raised.value)) < 500
    assert len(str(raised.value).splitlines()) == 1
    assert accepts(grammars, wanted(choice=[f"after {name}"]), f"after {name}")
