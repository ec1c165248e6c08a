"""A client that leaves takes its request with it."""

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from jaxserve import LLM
from jaxserve.engine.engine import Engine
from tests.server.cases import CONVERSATION

LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def slow(llm: LLM, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The server's engine, so slow that `LONG` takes longer than any test here waits."""
    step = llm.engine.step

    def slow_step() -> list:
        time.sleep(0.1)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)
    yield llm.engine
    wait_until(lambda: idle(llm.engine))


def idle(engine: Engine) -> bool:
    return engine.pool.num_available == engine.pool.num_pages and not engine.has_unfinished


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello", "n": 3}),
        ("/v1/completions", {"prompt": ["Hello", "What is this?"]}),
        ("/v1/chat/completions", {"messages": CONVERSATION}),
    ],
)
def test_in_the_middle_of_a_stream(client: httpx.Client, slow: Engine, path: str, body: dict) -> None:
    with client.stream("POST", path, json=body | LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert not idle(slow)
    wait_until(lambda: idle(slow))


def test_while_it_waits_for_a_whole_answer(client: httpx.Client, slow: Engine) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"prompt": ["Hello"] * 3} | LONG, timeout=1)
    wait_until(lambda: idle(slow))


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits_for_its_turn(client: httpx.Client, slow: Engine, stream: bool) -> None:
    with client.stream("POST", "/v1/completions", json={"prompt": "Hello", "n": 4, "stream": True} | LONG):
        wait_until(lambda: slow.scheduler.num_running == 4)  # as many as there is room for
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"prompt": "Hello", "stream": stream} | LONG, timeout=1)
        wait_until(lambda: slow.scheduler.num_waiting == 0)
        assert slow.scheduler.num_running == 4
    wait_until(lambda: idle(slow))


def test_the_others_go_on(client: httpx.Client, slow: Engine) -> None:
    asked = {"prompt": "Hello", "max_tokens": 12, "ignore_eos": True}
    alone = client.post("/v1/completions", json=asked).json()["choices"]
    with client.stream("POST", "/v1/completions", json={"prompt": "Hello", "stream": True} | LONG) as leaving:
        tokens = leaving.iter_lines()  # while it is referred to, the connection stays open
        next(tokens)
        with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as staying:
            lines = staying.iter_lines()
            first = next(lines)
            leaving.close()
            assert [first, *lines][-2] == "data: [DONE]"
    assert client.post("/v1/completions", json=asked).json()["choices"] == alone
