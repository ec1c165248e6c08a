"""The whole server as a process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jaxserve import EngineConfig, InputError
from jaxserve.server.serve import run

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
from jaxserve.config import EngineConfig
from jaxserve.server.serve import run
run(EngineConfig(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=512, page_size=16), host="127.0.0.1", port=0)
"""


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address, which it prints when it is ready."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("Serving demo_model on http://127.0.0.1:")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_running_stream_with_an_error_and_then_the_process(sent: signal.Signals) -> None:
    asked = {"prompt": "Hello", "ignore_eos": True, "stream": True, "max_tokens": 1900, "n": 8}
    with served() as (process, address):
        with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(process.pid, sent)
            ends = [line for line in lines if line][-1]
        assert '"error":{"message":"the server is shutting down"' in ends
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == ""


def test_the_servers_process_has_no_jax_and_the_engine_is_its_child() -> None:
    with served() as (process, address):
        assert httpx.get(f"{address}/health").status_code == 200
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        libraries = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (str(process.pid), child)}
    assert "jaxlib" in libraries[child]
    assert "jaxlib" not in libraries[str(process.pid)]


def test_what_cannot_be_loaded_is_said_in_one_line_without_a_traceback() -> None:
    words = ["serve", "--model", "/no/such/model", "--port", "0"]
    command = [sys.executable, "-m", "jaxserve.cli.main", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxserve: there is no model directory /no/such/model")
    assert done.stderr.count("\n") == 1


def test_an_address_in_use_is_said_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(EngineConfig(model="/no/such/model"), host="127.0.0.1", port=port)
