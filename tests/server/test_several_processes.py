"""A server whose model lies on the devices of two processes, as of two hosts."""

import os
import re
import signal
from typing import Any

import httpx

from tests.several_processes import ends, started

FLAGS = (
    "--port=0",
    "--dtype=float32",
    "--tensor-parallel-size=2",
    "--max-num-seqs=4",
    "--max-num-batched-tokens=64",
    "--max-model-len=2048",
    "--page-size=16",
)


def test_the_first_answers_and_a_signal_to_both_lets_what_runs_end() -> None:
    def command(own: dict[str, Any]) -> list[str]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
        return ["jaxserve.cli.main", "serve", *FLAGS, *flags]

    with started(command) as processes:
        while not (found := re.match(r"Serving demo_model on (\S+)", processes[0].stdout.readline())):
            assert processes[0].poll() is None, processes[0].stderr.read()
        asked = {"prompt": "Hello", "ignore_eos": True, "stream": True, "max_tokens": 400}
        with httpx.stream("POST", f"{found[1]}/v1/completions", json=asked, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            for process in reversed(processes):
                os.kill(process.pid, signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        (status, _, errors), (others_status, _, others_errors) = ends(processes)
    assert (status, others_status) == (0, 0), errors + others_errors
    assert "Process 1 of 2 works for process 0 at" in others_errors
    assert "Traceback" not in errors + others_errors
