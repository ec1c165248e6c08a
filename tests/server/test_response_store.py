"""The store of responses holds no more than it may."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.protocol.responses import ResponseObject
from jaxserve.server.response_store import ResponseStore, StoredResponse


def stored(id: str, characters: int) -> StoredResponse:
    given: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": "m",
        "output": [],
    }
    given |= {"parallel_tool_calls": True, "previous_response_id": None, "reasoning": {}, "store": True, "user": None}
    given |= {
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "text": {"format": {"type": "text"}},
    }
    response = ResponseObject(id=id, created_at=0, status="completed", **given)
    return StoredResponse(response, [{"role": "user", "content": "x" * characters}])


ONE = stored("0", 0).characters


def test_the_one_unused_for_longest_goes_first() -> None:
    store = ResponseStore(responses=2)
    for id in "ab":
        store.put(stored(id, 1))
    assert store.get("a")
    store.put(stored("c", 1))
    assert [bool(store.get(id)) for id in "abc"] == [True, False, True]


@given(st.lists(st.tuples(st.sampled_from("put get delete".split()), st.integers(0, 9), st.integers(0, 60))))
def test_no_history_makes_it_hold_more_than_it_may(steps: list[tuple[str, int, int]]) -> None:
    store = ResponseStore(responses=4, characters=2 * ONE + 50)
    there: dict[str, StoredResponse] = {}
    for number, (step, chosen, characters) in enumerate(steps):
        if step == "put":
            there[str(number)] = stored(str(number), characters)
            store.put(there[str(number)])
        elif there:
            id = sorted(there)[chosen % len(there)]
            found = store.get(id) if step == "get" else store.delete(id)
            if step == "delete":
                del there[id]
            assert found in (there.get(id), None, True, False)
        there = {id: response for id, response in there.items() if store.get(id)}
        assert len(there) <= 4
        assert sum(response.characters for response in there.values()) <= 2 * ONE + 50


def test_a_conversation_that_is_too_long_is_not_kept() -> None:
    store = ResponseStore(characters=ONE + 100)
    store.put(stored("a", 10))
    store.put(stored("b", 1000))
    assert store.get("b") is None
