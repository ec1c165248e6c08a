"""Log-probabilities in their shapes, where the token is not the likeliest one."""

import math

import pytest

from jaxserve import Logprob
from jaxserve.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs, prompt_offset

BROKEN = "\N{REPLACEMENT CHARACTER}"
# The token 5 was taken. As the engine has it: first the token, then more likely ones than anybody asked for.
POSITION = {
    5: Logprob(-4.0, 9, "é"),
    7: Logprob(-0.5, 1, "a"),
    2: Logprob(-1.5, 2, BROKEN),
    3: Logprob(-2.5, 3, BROKEN),
}


class Tokens(dict):
    """What tokens add to a text; at its beginning, without their space."""

    def first(self, token: int) -> bytes:
        return self[token].lstrip()


TOKENS = Tokens({0: b"<s>", 1: b" One", 2: b"\xc3", 3: b"\xa9", 5: "é".encode(), 7: b"a"})


def test_chat_lists_the_likeliest_in_order_and_the_token_apart() -> None:
    (entry,) = chat_logprobs([5], [POSITION], 2, TOKENS).content
    assert (entry.token, entry.logprob, entry.bytes) == ("é", -4.0, [0xC3, 0xA9])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("a", -0.5), (BROKEN, -1.5)]
    assert [top.bytes for top in entry.top_logprobs] == [[97], [0xC3]]  # half a character


def test_chat_lists_the_token_among_the_likeliest_in_its_place() -> None:
    (entry,) = chat_logprobs([3], [{3: POSITION[3], 7: POSITION[7], 2: POSITION[2]}], 3, TOKENS).content
    assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5, -2.5]


def test_completions_list_the_token_and_the_likeliest_by_text() -> None:
    logprobs, end = completion_logprobs([1, 5], [None, POSITION], 3, 10, TOKENS)
    assert (logprobs.tokens, end) == (["One", "é"], 14)
    assert logprobs.text_offset == [10, 13]
    assert logprobs.token_logprobs == [None, -4.0]
    assert logprobs.top_logprobs == [None, {"é": -4.0, "a": -0.5, BROKEN: -1.5}]  # the likelier of two that look alike
    assert completion_logprobs([5], [POSITION], 1, 0, TOKENS)[0].top_logprobs == [{"é": -4.0, "a": -0.5}]


def test_parts_of_a_character_take_its_place_in_the_text_together() -> None:
    parts = [{token: Logprob(-1.0, 1, BROKEN)} for token in (2, 3)]
    logprobs, end = completion_logprobs([2, 3, 5], [*parts, POSITION], 0, 0, TOKENS)
    assert (logprobs.text_offset, end) == ([0, 1, 1], 2)


def test_offsets_of_a_prompt_leave_out_what_its_text_does_not_have() -> None:
    assert prompt_offset([1, 1], "One One", TOKENS) == 0
    begin = prompt_offset([0, 1, 1], "One One", TOKENS)
    positions = [None, {1: Logprob(-1.0, 1, " One")}, {1: Logprob(-1.0, 1, " One")}]
    logprobs, end = completion_logprobs([0, 1, 1], positions, 0, begin, TOKENS)
    assert (logprobs.tokens, logprobs.text_offset, end) == (["<s>", " One", " One"], [0, 0, 3], 7)


def test_prompts_list_the_token_and_the_likeliest_by_id() -> None:
    first, second = prompt_logprobs([1, 5], [None, POSITION], 1)
    assert first is None
    assert {token: (found.logprob, found.rank, found.decoded_token) for token, found in second.items()} == {
        5: (-4.0, 9, "é"),
        7: (-0.5, 1, "a"),
    }


@pytest.mark.parametrize(("decoded", "tokens"), [("é", TOKENS), (None, None)])  # or there is no tokenizer
def test_what_cannot_be_is_a_number_that_json_has(decoded: str | None, tokens: Tokens | None) -> None:
    impossible = {5: Logprob(-math.inf, 100, decoded)}
    (entry,) = chat_logprobs([5], [impossible], 0, tokens).content
    assert (entry.token, entry.logprob) == (decoded or "", -9999.0)
    assert completion_logprobs([5], [impossible], 0, 0, tokens)[0].token_logprobs == [-9999.0]
    assert prompt_logprobs([5], [impossible], 0)[0][5].logprob == -9999.0
