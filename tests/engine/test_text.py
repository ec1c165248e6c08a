"""Tokens to text as they come: whole characters only, nothing past a stop string, the same text as at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxserve.config import DEMO_MODEL
from jaxserve.engine.detokenizer import TextStream


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, so that every character but ASCII's falls apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def stream_of(stop=(), include_stop=False, prompt="") -> TextStream:
    ids = TOKENIZER.encode(prompt).ids
    return TextStream(TOKENIZER, ids, stop=stop, include_stop=include_stop, skip_special_tokens=True)


def run(text: str, **settings) -> tuple[list[str], str | None]:
    """The pieces in which `text` comes out, and the stop string that ended it."""
    stream, pieces = stream_of(**settings), []
    for token in TOKENIZER.encode(text).ids:
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped is not None:
            return pieces, stopped
    return [*pieces, stream.flush()], None


@settings(deadline=None)
@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_pieces_add_up_to_the_text_and_hold_no_broken_character(text, prompt):
    pieces, _ = run(text, prompt=prompt)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None)
@given(
    text=st.text("ab🙂", max_size=30),
    stop=st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_text_ends_at_the_first_stop_string_to_be_completed(text, stop, include):
    pieces, stopped = run(text, stop=stop, include_stop=include)
    completed = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if not completed:
        assert stopped is None
        assert "".join(pieces) == text
        return
    seen = text[: completed[0]]
    begin, first = min((seen.find(s), s) for s in stop if s in seen)
    assert stopped == first
    assert "".join(pieces) == (seen[: begin + len(first)] if include else seen[:begin])


def test_only_what_may_become_a_stop_string_is_held_back():
    pieces, stopped = run("one STOXX two STOP three", stop=["STOP"])
    assert stopped == "STOP"
    assert "".join(pieces) == "one STOXX two "
    assert pieces[:4] == ["o", "n", "e", " "]
    assert pieces[4:8] == ["", "", "", "STOX"]


def test_stop_strings_wait_for_the_minimum_of_tokens():
    stream = stream_of(stop=["b"])
    assert stream.push(TOKENIZER.token_to_id("b"), may_stop=False) == ("b", None)
    assert stream.push(TOKENIZER.token_to_id("b")) == ("", "b")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_unfinished_character_at_the_end_is_left_out(count):
    stream = stream_of()
    pieces = [stream.push(token)[0] for token in TOKENIZER.encode("a🙂").ids[: 1 + count]]
    assert "".join([*pieces, stream.flush()]) == "a"


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


@settings(deadline=None, max_examples=200)
@given(prompt=st.lists(st.integers(0, 1279), max_size=12), ids=st.lists(st.integers(0, 1279), max_size=40))
def test_any_tokens_stream_to_the_text_that_they_decode_to_at_once(demo_tokenizer, prompt, ids):
    """Sampled tokens need not be a text's: bytes that make no character come out as replacement characters."""
    stream = TextStream(demo_tokenizer, prompt, stop=(), include_stop=False, skip_special_tokens=True)
    streamed = "".join([*(stream.push(token)[0] for token in ids), stream.flush()])
    whole = demo_tokenizer.decode(ids)
    context = demo_tokenizer.decode(prompt)
    if not context.endswith("\ufffd"):  # else the prompt's last character may be finished by the completion
        assert whole.startswith(streamed)
        assert set(whole[len(streamed) :]) <= {"\ufffd"}
