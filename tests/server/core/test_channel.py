"""Messages over a socket: whole, in order, and without waiting for whoever reads them."""

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import EngineConfig, SamplingParams
from jaxserve.engine.input_processor import CheckedInput
from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics
from jaxserve.sampling_params import Thinking
from jaxserve.server.core.channel import Channel, Closed
from jaxserve.server.core.messages import Abort, Add, Delta, FromCore, Start, Stepped, ToCore

PARAMS = SamplingParams(
    temperature=1,
    seed=2**64 - 1,
    stop=["end", "\0"],
    stop_token_ids=[3, 4],
    logit_bias={7: -1.5},
    logprobs=2,
    structured_outputs={"json": {"type": "string"}},
    thinking=Thinking((1, 2), budget=9),
)
INPUTS = {"a": CheckedInput(None, [0, 2**31 - 1], 5, frozenset({1, 2})), "b": CheckedInput("b", [3], 1, frozenset())}
ADD = Add(INPUTS, PARAMS, -(2**31), "salt", False)
STEPPED = Stepped(
    ["a"],
    [
        Delta(
            "a",
            [
                CompletionOutput(
                    1, "é\N{GRINNING FACE}", [5, 6], -1.5, [{5: Logprob(float("-inf"), 1, None)}], "stop", 3
                )
            ],
            True,
            RequestMetrics(1.0, 2.0, 3.0, 4, 1.5),
            [None, {6: Logprob(-0.25, 3, "x")}],
            [0.5, -1.0],
        )
    ],
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """The server's end and the core's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, FromCore), Channel(theirs, ToCore)


def test_messages_arrive_as_they_were_sent(ends: tuple[Channel, Channel]) -> None:
    server, core = ends
    config = EngineConfig(model="m", max_itl_ms=3)
    for message in (Start(config, "info", "text"), ADD, Abort(["a", "b"])):
        server.send(message)
    assert core.receive(wait=True) == [Start(config, "info", "text"), ADD, Abort(["a", "b"])]
    core.send(STEPPED)
    assert server.receive(wait=True) == [STEPPED]


@given(st.lists(st.integers(0, 300_000), max_size=6), st.integers(1, 4000))
@settings(max_examples=50, deadline=None)
def test_any_sizes_in_any_pieces(sizes: list[int], piece: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        messages = [Abort(["x" * size]) for size in sizes]
        frames = bytearray()
        for message in messages:
            payload = msgspec.msgpack.encode(message)
            frames += len(payload).to_bytes(4, "big") + payload
        core, received = Channel(theirs, ToCore), []
        for start in range(0, len(frames), max(piece, len(frames) // 50)):
            ours.sendall(frames[start : start + max(piece, len(frames) // 50)])
            received += core.receive(wait=False)
        assert received == messages


def test_sending_does_not_wait_for_the_reader(ends: tuple[Channel, Channel]) -> None:
    server, core = ends
    messages = [Abort(["x" * 100_000]) for _ in range(100)]
    for message in messages:
        server.send(message)
    assert server.unsent > 5_000_000  # far more than a socket takes
    received: list[ToCore] = []
    while len(received) < 100:
        received += core.receive(wait=False)
        server.flush()
    assert received == messages
    assert server.unsent == 0


def test_draining_waits_until_the_reader_has_caught_up(ends: tuple[Channel, Channel]) -> None:
    server, core = ends
    server.send(Abort(["x" * 10_000_000]))
    reader = threading.Thread(target=core.receive, kwargs={"wait": True})
    server.drain(0.01)
    assert server.unsent
    reader.start()
    server.drain()
    assert not server.unsent
    reader.join()


def test_what_came_before_the_end_is_received_first(ends: tuple[Channel, Channel]) -> None:
    server, core = ends
    server.send(Abort(["a"]))
    server.close()
    assert core.receive(wait=True) == [Abort(["a"])]
    for wait in (True, False):
        with pytest.raises(Closed):
            core.receive(wait=wait)


def test_sending_to_nobody(ends: tuple[Channel, Channel]) -> None:
    server, core = ends
    core.close()
    with pytest.raises(Closed):
        server.send(Abort(["a"]))


def test_a_message_of_another_type_is_an_error(ends: tuple[Channel, Channel]) -> None:
    server, core = ends
    server.send(STEPPED)
    with pytest.raises(msgspec.ValidationError, match="Stepped"):
        core.receive(wait=True)
