"""Bodies that are too large or too slow, heads that never end, and pages of other origins."""

import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.connections import PunctualProtocol
from jaxserve.server.keys import ApiKeys
from tests.server.cases import MODEL_NAME, error
from tests.server.conftest import serving
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

ASKED = {"prompt": "x", "max_tokens": 3}


@pytest.fixture(scope="module")
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def strict(fake: FakeEngine) -> Iterator[str]:
    """The address of a server that takes 1,000 bytes in half a second, and cuts connections after one."""
    config = ServerConfig(max_body_bytes=1000, read_timeout=0.5)
    with (
        core_thread(fake) as core,
        serving(build_app(core.client, MODEL_NAME, config), http=partial(PunctualProtocol, seconds=1.0)) as address,
    ):
        yield address


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(4096):
        received += chunk
    return received


def test_a_body_that_is_too_large_is_answered_and_the_connection_goes_on(strict: str) -> None:
    with httpx.Client(base_url=strict) as client:
        for size in (1001, 50_000_000):
            found = error(client.post("/v1/completions", content=b"x" * size), 413)
            assert found["message"] == "the body has more than 1000 bytes, which is the most; send less at a time"
        body = json.dumps(ASKED | {"user": "x" * 900})
        assert len(body) <= 1000
        assert client.post("/v1/completions", content=body).status_code == 200


def test_a_body_that_comes_too_slowly_is_refused(strict: str) -> None:
    with connect(strict) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"has not come within 0.5 seconds" in received


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_a_head_that_never_ends_is_cut_off_however_often_a_byte_comes(strict: str, sent: bytes) -> None:
    with connect(strict) as connection:
        start = time.monotonic()
        try:
            connection.sendall(sent)
            while time.monotonic() - start < 10:
                time.sleep(0.1)
                if sent:
                    connection.sendall(b"a")
                else:
                    connection.settimeout(10)
                    assert connection.recv(1) == b""
                    break
        except ConnectionError:
            pass
        assert 0.9 < time.monotonic() - start < 5
    assert httpx.get(f"{strict}/health").status_code == 200


def test_slow_clients_do_not_hold_up_others(strict: str) -> None:
    slow = [connect(strict) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        start = time.monotonic()
        assert httpx.post(f"{strict}/v1/completions", json=ASKED).status_code == 200
        assert time.monotonic() - start < 2
    finally:
        for connection in slow:
            connection.close()


def test_an_answer_may_take_longer_than_the_request(strict: str, fake: FakeEngine) -> None:
    fake.seconds_per_step = 0.5
    try:
        answer = httpx.post(f"{strict}/v1/completions", json=ASKED)
    finally:
        fake.seconds_per_step = 0
    assert answer.json()["choices"][0]["text"] == " 0 1 2"
    assert answer.elapsed.total_seconds() > 1.2


ORIGIN = {"Origin": "https://page.example"}


def test_browsers_may_call_only_from_the_origins_that_were_named() -> None:
    preflight = ORIGIN | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allow, keys = "access-control-allow-origin", ApiKeys({"ann": "secret"})
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        assert allow not in client.get("/health", headers=ORIGIN).headers
        assert client.options("/v1/completions", headers=preflight).status_code == 405
    config = ServerConfig(allowed_origins=["https://page.example"])
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME, config, keys)) as client:
        assert client.get("/health", headers=ORIGIN).headers[allow] == ORIGIN["Origin"]
        assert client.options("/v1/completions", headers=preflight).headers[allow] == ORIGIN["Origin"]
        assert (
            client.get("/v1/models", headers=ORIGIN).headers[allow] == ORIGIN["Origin"]
        )  # which is told that it lacks a key
        assert allow not in client.get("/health", headers={"Origin": "https://other.example"}).headers
