"""Streamed completions over HTTP, with as little work for each token as there can be: a client on the server's own
cores takes from what it measures."""

import asyncio
import dataclasses
import json
import ssl
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from jaxserve.errors import InputError

_PATH = "/v1/completions"
_TEXT = b'"text":'  # in an event that brings some of a completion


@dataclasses.dataclass(frozen=True)
class Stream:
    """What one request has seen, in seconds of `time.perf_counter`: when it was sent, and when each piece came."""

    sent: float
    arrivals: list[float]
    prompt_tokens: int
    output_tokens: int


async def run_streams(url: str, requests: Sequence[dict[str, Any]], at_once: int) -> list[Stream]:
    """Send the bodies to `/v1/completions` of the server at `url`, each when another one ends, `at_once` at a time.

    `InputError` if one is not answered, or not to its end.
    """
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or address.hostname is None:
        raise InputError(f"{url!r} is no address of a server; give one such as http://localhost:8000")
    messages = [_message(address, request) for request in requests]
    connections: list[_Connection] = []
    waiting = iter(messages)

    async def one_after_the_other() -> None:
        for message in waiting:
            connections.append(connection := _Connection(message))
            await _connect(address, connection)
            await connection.ended

    await asyncio.gather(*(one_after_the_other() for _ in range(min(at_once, len(messages)))))
    return [_read(connection) for connection in connections]


def _message(address: SplitResult, request: dict[str, Any]) -> bytes:
    body = json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST {address.path.rstrip('/')}{_PATH} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _connect(address: SplitResult, connection: "_Connection") -> None:
    secure = address.scheme == "https"
    context = ssl.create_default_context() if secure else None
    port = address.port or (443 if secure else 80)
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: connection, address.hostname or "", port, ssl=context
        )
    except OSError as error:
        raise InputError(f"nothing answers at {address.geturl()} ({error}); start a server there") from None


class _Connection(asyncio.Protocol):
    """One request. What comes is kept as it is and read once all requests have ended."""

    def __init__(self, message: bytes):
        self._message = message
        self.sent = time.perf_counter()
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._message)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _read(connection: _Connection) -> Stream:
    """What a connection has seen, once it is closed."""
    status, body = 0, b""
    arrivals: list[float] = []
    for at, event in _http_events(connection.pieces):
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if _TEXT in event.data and arrivals[-1:] != [at]:
                arrivals.append(at)
    chunks = [json.loads(line[len("data: ") :]) for line in body.decode().split("\n") if line.startswith("data: {")]
    failed = next((chunk["error"] for chunk in chunks if "error" in chunk), None)
    if status != 200 or failed or "data: [DONE]" not in body.decode()[-100:]:
        told = failed or body.decode()[:1000] or "nothing"
        raise InputError(f"the server did not answer to the end: status {status or 'none'}, {told}")
    usage = chunks[-1]["usage"]
    return Stream(connection.sent, arrivals, usage["prompt_tokens"], usage["completion_tokens"])


def _http_events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, Any]]:
    """A response's parts, each with the time at which it had come."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="POST", target=_PATH, headers=[("Host", "server"), ("Content-Length", "0")]))
    parser.send(h11.EndOfMessage())
    for at, piece in pieces:
        parser.receive_data(piece)
        while (event := parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            yield at, event
            if isinstance(event, h11.EndOfMessage):
                return
