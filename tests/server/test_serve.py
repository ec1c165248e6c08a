"""The whole server as its two processes: how it starts, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve import EngineConfig, InputError
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import run
from tests.server.processes import ROOT, has_ended, served, wait_until

LONG = {"prompt": "Hello", "ignore_eos": True, "stream": True, "max_tokens": 1900, "n": 4}


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
    events, (health, ready, refused) = drain(signal.SIGTERM, seconds=100, max_tokens=500)
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


def test_the_servers_process_has_no_jax_and_the_engine_is_its_child() -> None:
    with served() as server:
        assert httpx.get(f"{server.address}/health").status_code == 200
        libraries = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, server.core)}
        assert "jaxlib" in libraries[server.core]
        assert "jaxlib" not in libraries[server.process.pid]


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
