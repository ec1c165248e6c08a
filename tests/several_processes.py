"""Processes that run one model together, on one machine as on several hosts.

`python -m tests.several_processes TASK SETTINGS` is one of them, with `LLM(**SETTINGS)`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MIXED = "several kinds of requests, each with its tokens"
ENDLESS = "one request that goes on for minutes"
OF_A_JOB = "several kinds of requests to an engine of its own, in a process of a job that others started"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(
    command: Callable[[dict[str, Any]], Sequence[str]], *, count: int = 2, devices: int = 1
) -> Iterator[list[subprocess.Popen]]:
    """As many processes of a module's `command`, which is made of the settings that say which one it is."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m"),
                *command({"coordinator_address": address, "num_processes": count, "process_id": number}),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def scripts(task: str, *, devices: int = 1, **settings: Any) -> contextlib.AbstractContextManager:
    """Two processes that run `task` on an `LLM` of these settings."""
    return started(lambda own: ["tests.several_processes", task, json.dumps(settings | own)], devices=devices)


def ends(processes: list[subprocess.Popen], seconds: float = 400) -> list[tuple[int, str, str]]:
    """Each one's exit status, and the last line of what it printed, and all of its errors."""
    found = []
    for process in processes:
        printed, errors = process.communicate(timeout=seconds)
        # The library of collectives on CPUs writes lines of its own.
        found.append((process.returncode, (printed.splitlines() or [""])[-1], errors))
    return found


def answers(llm: Any) -> list[Any]:
    """What `llm` answers to requests of all kinds that a step can have, together in its batches."""
    from jaxserve import SamplingParams, StructuredOutputsParams

    prompts = ["Hello", {"prompt_token_ids": list(range(1, 90))}, "1+1=", "The capital of", "A list:"]
    params = [
        SamplingParams(temperature=0, max_tokens=24, logprobs=2),
        SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=1),
        SamplingParams(temperature=1.1, seed=3, max_tokens=20, top_p=0.9, repetition_penalty=1.2, logit_bias={7: 2.0}),
        SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=16, stop=["e"]),
        SamplingParams(max_tokens=12, seed=1, structured_outputs=StructuredOutputsParams(regex="[a-z]{10}")),
    ]
    adapters = [*llm.engine.inputs.limits.adapters, *[None] * len(prompts)][: len(prompts)]
    outputs = llm.generate(prompts, params, adapter=adapters)
    found: list[Any] = [[completion.token_ids for completion in output.outputs] for output in outputs]
    found.append(round(outputs[0].outputs[0].cumulative_logprob, 3))
    found.append([round(number, 3) for number in llm.embed("Hello there")[0][:8]])
    found.append([round(number, 3) for number in llm.score("1+1=", "2")[0].logprobs])
    return found


def _main(task: str, text: str) -> None:
    import jax

    from jaxserve import LLM, SamplingParams

    settings = json.loads(text)
    if task == OF_A_JOB:
        named = [settings.pop(name) for name in ("coordinator_address", "num_processes", "process_id")]
        jax.distributed.initialize(*named)
    with LLM(progress=False, **settings) as llm:
        if task in (MIXED, OF_A_JOB):
            print(json.dumps(answers(llm)))
            return
        for output in llm.stream("Hello", SamplingParams(ignore_eos=True, max_tokens=100_000)):
            print(output.outputs[0].token_ids, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
