"""The whole server as its two processes: how it starts, and how it ends."""

import json
import os
import resource
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from jaxserve import EngineConfig, InputError
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import run
from tests.server.processes import ROOT, Served, has_ended, served, wait_until

LONG = {"prompt": "Hello", "ignore_eos": True, "stream": True, "max_tokens": 1900, "n": 16}


def drain(*signals: signal.Signals, seconds: float, **asked: Any) -> tuple[list[str], list[httpx.Response]]:
    """Send signals while a stream runs; its events, and what the server answered others meanwhile."""
    others: list[httpx.Response] = []
    with served(drain_timeout=seconds) as server:
        core = server.core
        with httpx.stream("POST", f"{server.address}/v1/completions", json=LONG | asked, timeout=120) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            for sent in signals:
                os.kill(server.process.pid, sent)
                time.sleep(0.3)
            if len(signals) == 1 and seconds > 1:
                others = [httpx.get(f"{server.address}{path}") for path in ("/health", "/ready")]
                others.append(httpx.post(f"{server.address}/v1/completions", json={"prompt": "Hello"}))
            events += [line for line in lines if line]
        assert server.process.wait(timeout=30) == 0
        assert server.process.stdout.read() == ""
        assert has_ended(core)
        assert "Traceback" not in server.stderr
    return events, others


def test_a_signal_lets_what_runs_end_and_takes_nothing_new() -> None:
    events, (health, ready, refused) = drain(signal.SIGTERM, seconds=100)
    assert events[-1] == "data: [DONE]"
    assert (health.status_code, ready.status_code, refused.status_code) == (200, 503, 503)
    assert "shutting down" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "5"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT]])
def test_what_runs_longer_than_it_may_ends_with_an_error(signals: list[signal.Signals]) -> None:
    events, _ = drain(*signals, seconds=0.5)
    assert '"error":{"message":"the server is shutting down"' in events[-1]


def test_a_second_signal_ends_what_runs_at_once() -> None:
    events, _ = drain(signal.SIGINT, signal.SIGTERM, seconds=100)
    assert '"error":{"message":"the server is shutting down"' in events[-1]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """For tests that leave it as it is."""
    with served() as server:
        yield server


def test_the_servers_process_has_no_jax_and_the_engine_is_its_child(server: Served) -> None:
    assert httpx.get(f"{server.address}/health").status_code == 200
    libraries = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, server.core)}
    assert "jaxlib" in libraries[server.core]
    assert "jaxlib" not in libraries[server.process.pid]


def test_clients_that_come_and_vanish_leave_nothing_open(server: Served) -> None:
    def open_files() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (server.process.pid, server.core)]

    body = json.dumps(LONG).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    address = urlsplit(server.address)
    before = open_files()
    for _ in range(3):
        connections = [socket.create_connection((address.hostname, address.port)) for _ in range(100)]
        for connection in connections:
            connection.sendall(request)
        assert select.select(connections, [], [], 20)[0]  # one of them streams
        wait_until(lambda: open_files()[0] > before[0] + 90)
        for connection in connections:
            connection.close()
        wait_until(lambda: open_files() <= before)
    asked = {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.address}/v1/completions", json=asked, timeout=10)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_more_connections_than_there_may_be_open_files_end_no_stream_and_are_over_once_they_close(
    server: Served,
) -> None:
    pid, address = server.process.pid, urlsplit(server.address)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 20, limits[1]))
    try:
        with httpx.stream("POST", f"{server.address}/v1/completions", json=LONG, timeout=120) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            connections = [socket.create_connection((address.hostname, address.port)) for _ in range(200)]
            events += [line for line in lines if line]
            for connection in connections:
                connection.close()
        assert events[-1] == "data: [DONE]"
        asked = {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
        answer = httpx.Client(transport=httpx.HTTPTransport(retries=5)).post(
            f"{server.address}/v1/completions", json=asked, timeout=20
        )
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert server.process.poll() is None
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_killed_engine_fails_every_request_and_ends_the_server_with_a_line_and_a_status() -> None:
    answers: list[httpx.Response] = []

    def ask(address: str, stream: bool) -> None:
        answers.append(httpx.post(f"{address}/v1/completions", json=LONG | {"stream": stream}, timeout=60))

    with served() as server:
        threads = [threading.Thread(target=ask, args=(server.address, stream)) for stream in (True, False, True, False)]
        with httpx.stream("POST", f"{server.address}/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for thread in threads:  # these wait: the first has all places
                thread.start()
            time.sleep(1)
            os.kill(server.core, signal.SIGKILL)
            ends = [line for line in lines if line][-1]
        for thread in threads:
            thread.join()
        assert server.process.wait(timeout=30) == 1
        message = "the engine has stopped after an error; the server's log has it"
        for text in (ends, *(answer.text.strip().split("\n\n")[-1] for answer in answers)):
            assert json.loads(text.removeprefix("data: "))["error"]["message"] == message
        assert len(answers) == 4
        assert (
            server.stderr.splitlines()[-1]
            == "jaxserve: the engine process was killed by SIGKILL, and the server with it"
        )
        assert "Traceback" not in server.stderr


def test_an_engine_that_hangs_is_told_by_health_and_ends_when_the_server_is_killed() -> None:
    with served() as server:
        core = server.core
        health = f"{server.address}/health"
        os.kill(core, signal.SIGSTOP)
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(health, timeout=2)
        os.kill(core, signal.SIGCONT)
        assert httpx.get(health, timeout=30).status_code == 200
        server.process.kill()
        wait_until(lambda: has_ended(core))


def test_an_engine_in_a_step_ends_when_the_server_is_killed() -> None:
    with served() as server:
        core = server.core
        with httpx.stream("POST", f"{server.address}/v1/completions", json=LONG, timeout=60) as response:
            next(response.iter_lines())
            server.process.kill()
            wait_until(lambda: has_ended(core))


def test_what_cannot_be_loaded_is_said_in_one_line_without_a_traceback() -> None:
    words = ["serve", "--model", "/no/such/model", "--port", "0"]
    command = [sys.executable, "-m", "jaxserve.cli.main", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxserve: there is no model directory /no/such/model")
    assert done.stderr.count("\n") == 1


def test_an_engine_that_is_killed_while_it_loads_is_said_in_one_line() -> None:
    command = [sys.executable, "-m", "jaxserve.cli.main", "serve", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text().split())
    os.kill(int(children.read_text()), signal.SIGKILL)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert errors == "jaxserve: the engine process was killed by SIGKILL while it was loading\n"


def test_an_address_in_use_is_said_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(EngineConfig(model="/no/such/model"), ServerConfig(port=port))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of 127.0.0.1, signed by itself; and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    made = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {certificate}"
    subject = ["-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made.split(), *subject], check=True, capture_output=True)
    return certificate, key


def test_https_keys_and_a_json_log_over_the_command_line(certificate: tuple[str, str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("ann secret-of-ann\n")
    flags = ["--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1], "--api-key-file", str(keys)]
    with served(*flags, "--log-format", "json") as server:
        assert server.address.startswith("https://")
        trust = ssl.create_default_context(cafile=certificate[0])
        with httpx.Client(base_url=server.address, verify=trust) as client:
            assert client.get("/health").status_code == 200
            asked = {"prompt": "a secret prompt", "max_tokens": 2}
            assert client.post("/v1/completions", json=asked).status_code == 401
            headers = {"Authorization": "Bearer secret-of-ann", "X-Request-Id": "mine"}
            assert client.post("/v1/completions", json=asked, headers=headers).status_code == 200
        lines = [json.loads(line) for line in server.stderr.splitlines()]
        assert "secret" not in server.stderr
    assert any(line["message"].startswith("attention runs in ") for line in lines)
    refused, answered = [line for line in lines if line["logger"] == "jaxserve.server.request_log"]
    assert (refused["status"], "key" in refused) == (401, False)
    assert (answered["status"], answered["key"], answered["request_id"]) == (200, "ann", "mine")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ssl_certfile": "/no/such/file"}, "cannot use the certificate of /no/such/file"),
        ({"ssl_keyfile": "/no/such/file"}, "ssl_certfile is not"),
        ({"api_key_file": "/no/such/file"}, "cannot read the API keys of /no/such/file"),
        ({"max_requests_per_key": 3}, "api_key_file is not"),
        ({"port": 70_000}, "port is 70000"),
        ({"max_queued_requests": 0}, "max_queued_requests is 0; give an integer from 1 on"),
        ({"drain_timeout": float("nan")}, "drain_timeout is nan; give a number from 0 on"),
        ({"allowed_origins": "x"}, "allowed_origins is 'x'; give a list"),
    ],
)
def test_settings_that_cannot_be_are_said_before_the_model_loads(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        run(EngineConfig(model="/no/such/model"), ServerConfig(**settings))
