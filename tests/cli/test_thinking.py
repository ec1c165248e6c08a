"""Thinking and answer are told apart, however the text is cut into pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cli.thinking import ThinkingSplitter, split_thinking


def joined(pieces: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    groups = itertools.groupby(pieces, key=lambda piece: piece[0])
    return [(thinking, "".join(text for _, text in group)) for thinking, group in groups]


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\n2+3=5\n</think>\n\n5", False, [(True, "2+3=5\n"), (False, "5")]),
        ("2+3=5\n</think>\n\n5", True, [(True, "2+3=5\n"), (False, "5")]),
        ("<think>\n\n</think>\n\nPlain.", False, [(False, "Plain.")]),
        ("No thinking <th", False, [(False, "No thinking <th")]),
        ("\nKeeps its own line break", False, [(False, "\nKeeps its own line break")]),
        ("<think>cut off", False, [(True, "cut off")]),
        ("", False, []),
    ],
)
def test_whole_texts(text: str, inside: bool, expected: list[tuple[bool, str]]):
    assert joined(split_thinking(text, inside=inside)) == expected


@given(pieces=st.lists(st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "think>", "\n", "a", "<", ">"])))
def test_pieces_add_up_to_the_whole(pieces: list[str]):
    splitter = ThinkingSplitter()
    found = [part for piece in pieces for part in splitter.push(piece)]
    found += splitter.flush()
    assert joined(found) == joined(split_thinking("".join(pieces)))
