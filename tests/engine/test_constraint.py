"""What the next token of a sequence may be, with grammars over the demo model's tokenizer."""

import json
import re
import time
from typing import Any

import numpy as np
import pytest

from jaxserve.checkpoint.tokenizer import load_tokenizer
from jaxserve.config import DEMO_MODEL
from jaxserve.engine.constraint import Constraint
from jaxserve.engine.grammars import Grammars
from jaxserve.errors import InputError
from jaxserve.runner.step_batch import mask_words
from jaxserve.sampling_params import ChatGrammar, SamplingParams, Thinking
from jaxserve.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams

VOCAB = 1280
TOKENIZER = load_tokenizer(DEMO_MODEL)
END, PAD = (TOKENIZER.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>"))
OPEN, CLOSE = (TOKENIZER.convert_tokens_to_ids(text) for text in ("<think>", "</think>"))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[END, PAD])


def compiled(grammars: Grammars, **wanted: Any) -> Any:
    return grammars.compiled(SamplingParams(structured_outputs=StructuredOutputsParams(**wanted)))


def allowed(constraint: Constraint) -> set[int] | None:
    """The tokens that may come next, or None for all."""
    mask = np.zeros(mask_words(VOCAB), np.uint32)
    if not constraint.allow(mask):
        return None
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def follows(constraint: Constraint, text: str) -> bool:
    """Whether the constraint lets all of `text` through."""
    for token in ids(text):
        if token not in (allowed(constraint) or set()):
            return False
        constraint.accept(token)
    return True


FORMS = {
    "json": ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 12}'),
    "json_object": ({"json_object": True}, '{"b": [1, "x"]}'),
    "regex": ({"regex": "[a-c]+[0-9]{2}"}, "abca42"),
    "choice": ({"choice": ["yes", "no, never"]}, "no, never"),
    "lark": ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]+/'}, "<word>"),
    "gbnf": ({"grammar": 'root ::= "a" [0-9]'}, "a7"),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_lets_through_what_it_means_and_ends_with_it(grammars, form):
    wanted, text = FORMS[form]
    constraint = Constraint(compiled(grammars, **wanted), None)
    assert constraint.binding
    assert follows(constraint, text)
    assert constraint.complete or END in (allowed(constraint) or set())


@pytest.mark.parametrize("form", FORMS)
def test_no_form_lets_anything_else_through(grammars, form):
    constraint = Constraint(compiled(grammars, **FORMS[form][0]), None)
    assert not follows(constraint, "Hello there")


def test_two_sequences_of_one_grammar_are_told_apart(grammars):
    matcher = compiled(grammars, choice=["ab", "cd"])
    one, other = (Constraint(matcher, None) for _ in range(2))
    assert follows(one, "ab")
    assert follows(other, "cd")


def test_thinking_is_free_and_the_grammar_binds_behind_it(grammars):
    matcher = compiled(grammars, choice=["7"])
    constraint = Constraint(matcher, Thinking(end=(CLOSE,)), ends=[END, PAD])
    for token in [*ids("Let me see."), CLOSE]:
        assert set(range(VOCAB)) - (allowed(constraint) or set()) == {END, PAD}  # the answer is still to come
        constraint.accept(token)
    assert allowed(constraint) == set(ids("7"))


@pytest.mark.parametrize("thinks", [True, False])
def test_a_model_that_may_think_first_begins_with_either(grammars, thinks):
    matcher = compiled(grammars, choice=["7"])
    constraint = Constraint(matcher, Thinking(start=(OPEN,), end=(CLOSE,)))
    assert allowed(constraint) == {OPEN, *ids("7")}
    if thinks:
        for token in (OPEN, *ids("So."), CLOSE):
            constraint.accept(token)
        assert allowed(constraint) == set(ids("7"))
    constraint.accept(*ids("7"))
    assert constraint.complete


def test_a_model_that_begins_as_thinking_does_may_go_on_as_it_likes():
    constraint = Constraint(None, Thinking(start=(OPEN, 100, 101), end=(CLOSE,), budget=0, closing=(CLOSE,)))
    for token in (OPEN, 100, 102):
        assert allowed(constraint) is None
        assert constraint.binding
        constraint.accept(token)
    assert not constraint.binding


def test_a_spent_budget_closes_the_thinking_and_then_nothing_binds():
    closing = (*ids("\n"), CLOSE)
    constraint = Constraint(None, Thinking(start=(OPEN,), end=(CLOSE,), budget=2, closing=closing))
    for token in (OPEN, 100, 101):
        assert allowed(constraint) is None
        assert constraint.binding
        constraint.accept(token)
    for token in closing:
        assert allowed(constraint) == {token}
        constraint.accept(token)
    assert not constraint.binding


def test_a_budget_of_nothing_closes_what_the_prompt_has_opened_at_once(grammars):
    constraint = Constraint(compiled(grammars, choice=["7"]), Thinking(end=(CLOSE,), budget=0, closing=(CLOSE,)))
    assert allowed(constraint) == {CLOSE}
    constraint.accept(CLOSE)
    assert allowed(constraint) == set(ids("7"))


def test_thinking_that_opens_with_several_tokens_is_gone_through_with_once_it_has_begun(grammars):
    constraint = Constraint(compiled(grammars, choice=["7"]), Thinking(start=(OPEN, 100), end=(CLOSE,)))
    assert allowed(constraint) == {OPEN, *ids("7")}
    constraint.accept(OPEN)
    assert allowed(constraint) == {100}
    constraint.accept(100)
    assert allowed(constraint) is None


def test_a_few_blanks_may_stand_between_thinking_and_answer_and_no_more(grammars):
    (blank,) = ids("\n")
    constraint = Constraint(compiled(grammars, choice=["7"]), Thinking(end=(CLOSE,), blank=(blank,)))
    constraint.accept(CLOSE)
    for _ in range(2):
        assert allowed(constraint) == {blank, *ids("7")}
        constraint.accept(blank)
    assert allowed(constraint) == set(ids("7"))
    constraint.accept(*ids("7"))
    assert constraint.complete


def test_a_blank_that_the_grammar_wants_is_the_grammars(grammars):
    (blank,) = ids("\n")
    constraint = Constraint(compiled(grammars, regex="\n7"), Thinking(end=(CLOSE,), blank=(blank,)))
    for token in (CLOSE, blank):
        constraint.accept(token)
    assert allowed(constraint) == set(ids("7"))


def test_a_grammar_of_the_thinking_too_binds_from_the_first_token_on(grammars):
    within = ChatGrammar('start: /[a-c]+/ "!" content')
    wanted = StructuredOutputsParams(choice=["7"])
    matcher = grammars.compiled(SamplingParams(structured_outputs=wanted, chat_grammar=within))
    thinking = Thinking(end=tuple(ids("!")), budget=3, closing=tuple(ids("!")), in_grammar=True)
    for letters in ("ab", "abc"):  # within the budget, and up to it
        constraint = Constraint(matcher, thinking)
        assert allowed(constraint) <= set(range(VOCAB)) - set(ids("d7!"))
        for letter in letters:
            assert constraint.binding
            assert follows(constraint, letter)
        assert (allowed(constraint) == set(ids("!"))) == (letters == "abc")
        assert follows(constraint, "!")
        assert allowed(constraint) == set(ids("7"))
        assert follows(constraint, "7")
        assert constraint.complete


def test_a_grammar_that_ends_nowhere_says_so_in_words(grammars):
    constraint = Constraint(compiled(grammars, grammar='start: "x" never\nnever: never "y"'), None)
    assert follows(constraint, "x")
    assert not allowed(constraint) & set(ids("xy"))
    assert constraint.error == "it leaves nothing that may come next"


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ('start: a\na: a a | "x"', "take too long"),
        ('start: a\na: "x" a "x" | "x" a | "x"', "take too long|Current row has"),
    ],
)
def test_a_grammar_that_gets_too_large_on_the_way_says_so_and_takes_little_of_the_steps(grammars, grammar, said):
    constraint = Constraint(compiled(grammars, grammar=grammar), None)
    (x,) = ids("x")
    start, tokens = time.thread_time(), 0
    while not constraint.error and tokens < 5000:
        assert x in allowed(constraint)
        constraint.accept(x)
        tokens += 1
    assert re.search(said, constraint.error)
    assert time.thread_time() - start < 2 + 0.003 * tokens


def test_thinking_that_ends_within_its_budget_is_left_alone():
    constraint = Constraint(None, Thinking(end=(CLOSE,), budget=5, closing=(CLOSE,)))
    for token in (100, 101, CLOSE):
        assert allowed(constraint) is None
        constraint.accept(token)
    assert not constraint.binding


def test_an_end_of_several_tokens_is_the_end_only_in_whole():
    constraint = Constraint(None, Thinking(end=(4, 5)))
    for token in (4, 4, 6, 5):
        constraint.accept(token)
        assert constraint.binding
    for token in (4, 5):
        constraint.accept(token)
    assert not constraint.binding


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "has no form; give one of json, json_object, regex, choice, grammar"),
        ({"json": "{}", "regex": "a"}, "has json and regex; give one of"),
        ({"jsn": "{}"}, "no field 'jsn'; did you mean 'json'"),
        ({"json": 3}, "json is a int; give a schema or its text"),
        ({"choice": []}, "choice is no list of non-empty texts"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, f"regex has {MAX_CHARACTERS + 1} characters and at most"),
        ({"regex": "a", "disable_any_whitespace": True}, "white space is for JSON to set"),
        ({"json_object": "yes"}, "json_object is 'yes'; give true or leave it out"),
        ({"regex": "\ud800"}, "regex holds half a surrogate pair"),
        ({"choice": ["a", "\udfff"]}, "choice holds half a surrogate pair"),
        ({"json": {}, "whitespace_pattern": "\ud800"}, "json holds half a surrogate pair"),
    ],
)
def test_what_is_no_structured_output_is_refused_by_its_field(wanted, said):
    with pytest.raises(InputError, match=said):
        StructuredOutputsParams(**wanted)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"json": "{"}, "json is no JSON"),
        ({"json": {"type": "strange"}}, "json cannot be followed"),
        ({"json": {"not": {"type": "string"}}}, "json cannot be followed"),
        ({"regex": "(a"}, "regex cannot be followed"),
        ({"regex": "(?=a)b"}, "regex cannot be followed"),
        ({"grammar": "start: nothing_here"}, "grammar cannot be followed"),
        ({"regex": r"[^\s\S]"}, r"regex cannot be followed \(it leaves nothing that may come next\); mend it"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_runs(grammars, wanted, said):
    with pytest.raises(InputError, match=said):
        compiled(grammars, **wanted)


def test_schemas_as_dict_and_as_text_are_the_same():
    schema = {"type": "string"}
    assert StructuredOutputsParams(json=schema) == StructuredOutputsParams(json=json.dumps(schema))
