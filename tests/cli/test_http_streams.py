"""The client of `jaxserve bench serve`, against servers that send what a test says."""

import asyncio
from collections.abc import Sequence

import pytest

from jaxserve import InputError
from jaxserve.cli.bench.http_streams import Stream, run_streams

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = b'{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3}}'


def chunk(data: bytes) -> bytes:
    event = b"data: %s\n\n" % data
    return b"%x\r\n%s\r\n" % (len(event), event)


def text(word: str) -> bytes:
    return chunk(b'{"choices":[{"text":"%s"}]}' % word.encode())


LAST = chunk(USAGE) + chunk(b"[DONE]") + b"0\r\n\r\n"


def streams(pieces: Sequence[bytes], requests: int = 1, at_once: int = 1) -> tuple[list[Stream], list[int]]:
    """What the client makes of a server that sends these pieces one after another; connections open at each request."""
    open_now, seen = 0, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        seen.append(open_now)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        open_now -= 1
        writer.close()

    async def run() -> list[Stream]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await run_streams(f"http://127.0.0.1:{port}/base/", [{"prompt": [1]}] * requests, at_once)

    return asyncio.run(run()), seen


def test_each_piece_of_text_has_its_arrival_and_what_ends_a_stream_has_none() -> None:
    (stream,), _ = streams([HEAD, text("a"), text("b") + text("c"), LAST])
    assert (stream.prompt_tokens, stream.output_tokens) == (4, 3)
    assert len(stream.arrivals) == 2
    assert stream.sent + 0.015 < stream.arrivals[0] < stream.arrivals[1] - 0.01


def test_no_more_than_so_many_run_at_a_time() -> None:
    found, seen = streams([HEAD + text("a") + LAST], requests=6, at_once=2)
    assert len(found) == 6
    assert max(seen) == 2


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nwait"], "status 429, wait"),
        ([HEAD, text("a"), chunk(b'{"error":{"message":"it died"}}'), b"0\r\n\r\n"], "it died"),
        ([HEAD, text("a"), chunk(USAGE), b"0\r\n\r\n"], "did not answer to the end"),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_tells_it(pieces: list[bytes], told: str) -> None:
    with pytest.raises(InputError, match=told):
        streams(pieces)


def test_a_connection_that_breaks_off_is_told() -> None:
    with pytest.raises(InputError, match="did not answer to the end"):
        streams([HEAD, text("a")])
    with pytest.raises(InputError, match="is no address of a server"):
        asyncio.run(run_streams("localhost:8000", [], 1))
