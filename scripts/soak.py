"""Keep a server busier than it can be, with requests of all kinds and clients that leave, and see that nothing leaks.

    python scripts/soak.py --minutes 10
    python scripts/soak.py --minutes 10 -- --model MODEL --max-num-seqs 64      # flags of jaxserve serve

It starts the server itself and reads everything from its /metrics. At the end, all pages of the KV cache have to be
free or cached again, and open files and tasks no more than before; memory may not have grown by more than
--max-growth MiB over the second half, as a line through its samples has it. Every request has to be answered to its
end, unless its client left, and nothing may have been compiled. The exit status is 1 if any of it does not hold.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table

ENGINE = "--max-num-seqs 16 --max-num-batched-tokens 128 --max-model-len 1024 --page-size 16".split()
# A client that leaves as it connects may keep its connection open and send nothing, as httpx's sometimes do: the
# server has to cut it, within the minute in which it has to become idle.
SERVER = "--read-timeout 20".split()
MEMORY = {
    "memory of the server, MiB": "process_resident_memory_bytes",
    "memory of the engine, MiB": "jaxserve_engine_process_resident_memory_bytes",
}
COUNTS = {
    "open files of the server": "process_open_fds",
    "open files of the engine": "jaxserve_engine_process_open_fds",
    "tasks of the server": "jaxserve:tasks",
    "pages held": "jaxserve:pages held",
    "programs compiled": "jaxserve:compilations_total",
}
WAITING, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
PAGES = [f"jaxserve:pages {state}" for state in ("held", "cached", "free")]
SHARED = "The quick brown fox jumps over the lazy dog and the old farmer carries a lamp to the market. " * 8
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "day": {"type": "string"}},
            "required": ["city", "day"],
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What `/metrics` said so many seconds after the beginning."""

    at: float
    values: dict[str, float]


# Requests, by kind: a path and a body


def _completion(dice: random.Random) -> dict[str, Any]:
    settings = {"temperature": dice.choice((0, 1)), "max_tokens": dice.randint(1, 150), "ignore_eos": True}
    return settings | {"prompt": "Hello there " * dice.randint(1, 30), "stop": dice.choice((None, ["zzz"]))}


def _chat(dice: random.Random) -> dict[str, Any]:
    question = f"What is {dice.randint(0, 999)}+{dice.randint(0, 999)}?"
    return {"messages": [{"role": "user", "content": question}], "max_tokens": dice.randint(1, 200)}


def _wanted(dice: random.Random) -> dict[str, Any]:
    """Mostly what was wanted before, and now and then a new grammar."""
    if dice.random() < 0.1:
        return {"regex": f"(yes|no|{dice.randint(0, 10**6)})+"}
    return {"json": TOOL["function"]["parameters"]} if dice.random() < 0.5 else {"choice": ["yes", "no"]}


KINDS: dict[str, tuple[str, Callable[[random.Random], dict[str, Any]]]] = {
    "stream": ("/v1/completions", lambda dice: _completion(dice) | {"stream": True}),
    "whole": ("/v1/completions", lambda dice: _completion(dice) | {"n": dice.choice((1, 3))}),
    "several prompts": ("/v1/completions", lambda dice: _completion(dice) | {"prompt": ["a", "b"], "stream": True}),
    "log-probabilities": ("/v1/completions", lambda dice: _completion(dice) | {"logprobs": 3, "stream": True}),
    "prefix": ("/v1/completions", lambda dice: _completion(dice) | {"prompt": f"{SHARED}{dice.random()}"}),
    "chat": ("/v1/chat/completions", lambda dice: _chat(dice) | {"stream": True}),
    "tools": ("/v1/chat/completions", lambda dice: _chat(dice) | {"tools": [TOOL], "stream": dice.random() < 0.5}),
    "structured": ("/v1/completions", lambda dice: _completion(dice) | {"structured_outputs": _wanted(dice)}),
    "messages": ("/v1/messages", lambda dice: _chat(dice) | {"model": "demo_model"}),
    "embedding": ("/v1/embeddings", lambda dice: {"input": "Hello there " * dice.randint(1, 30)}),
    "refused": ("/v1/completions", lambda dice: _completion(dice) | {"temperature": -1}),
}


async def _ask(client: httpx.AsyncClient, kind: str, dice: random.Random, counts: Counter) -> None:
    """One request, whose client may leave at any time; counts how it ended."""
    path, make = KINDS[kind]
    body = make(dice)
    patience = dice.random() * 2 if dice.random() < 0.3 else 300.0
    try:
        async with asyncio.timeout(patience), client.stream("POST", path, json=body) as response:
            answer = (await response.aread()).decode()
    except TimeoutError:
        counts[kind, "left" if patience < 300 else "hung"] += 1
        return
    except httpx.HTTPError as error:
        counts[kind, f"failed: {error!r}"] += 1
        return
    if kind == "refused":
        good = response.status_code == 400
    elif body.get("stream"):
        good = response.status_code == 200 and answer.endswith("data: [DONE]\n\n")
    else:
        good = response.status_code == 200 and "error" not in json.loads(answer)
    counts[kind, "answered" if good else f"wrong: {response.status_code} {answer[-200:]}"] += 1


async def _sample(client: httpx.AsyncClient, start: float) -> Sample:
    values: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            values[" ".join(filter(None, (sample.name, sample.labels.get("state"))))] = sample.value
    return Sample(time.monotonic() - start, values)


async def soak(url: str, seconds: float, clients: int, seed: int) -> tuple[list[Sample], Counter]:
    """Samples from before the first request to when the server is idle again, and how requests ended, by kind."""
    dice, counts, kinds = random.Random(seed), Counter[tuple[str, str]](), list(KINDS)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        for kind in kinds:  # what the first of each leaves behind is no leak
            await _ask(client, kind, random.Random(seed), Counter())
        await _idle(client)
        start = time.monotonic()
        samples = [await _sample(client, start)]

        async def ask() -> None:
            while time.monotonic() < start + seconds:
                await _ask(client, dice.choice(kinds), dice, counts)

        async def watch() -> None:
            while time.monotonic() < start + seconds:
                await asyncio.sleep(min(5.0, seconds / 20))
                samples.append(await _sample(client, start))

        await asyncio.gather(watch(), *(ask() for _ in range(clients)))
        samples.append(await _idle(client, start, samples[0]))
    return samples, counts


async def _idle(client: httpx.AsyncClient, start: float = 0.0, before: Sample | None = None) -> Sample:
    """Once no request runs and, as far as a minute does it, what was opened since `before` is closed."""
    deadline = time.monotonic() + 60
    while True:
        await asyncio.sleep(0.5)
        sample = await _sample(client, start)
        runs = sample.values[RUNNING] + sample.values[WAITING] + sample.values["jaxserve:pages held"]
        if (not runs and not (before and _more(before, sample))) or time.monotonic() > deadline:
            return sample


def _more(before: Sample, after: Sample) -> list[str]:
    """What there was less of before."""
    return [
        f"{title}: {after.values[name]:.0f} after {before.values[name]:.0f}"
        for title, name in COUNTS.items()
        if after.values[name] > before.values[name]
    ]


def growth(samples: list[Sample], name: str) -> float:
    """Of the second half, in MiB: how much a line through its samples rises."""
    half = [sample for sample in samples if sample.at >= samples[-1].at / 2]
    times, values = [sample.at for sample in half], [sample.values[name] / 2**20 for sample in half]
    return float(np.polyfit(times, values, 1)[0] * (times[-1] - times[0])) if len(half) > 1 else 0.0


def failures(samples: list[Sample], counts: Counter, max_growth: float) -> list[str]:
    """What does not hold."""
    first, last = samples[0].values, samples[-1].values
    found = _more(samples[0], samples[-1])
    if sum(last[name] for name in PAGES) != sum(first[name] for name in PAGES):
        found.append("there are not as many pages as before")
    for title, name in MEMORY.items():
        if (grown := growth(samples, name)) > max_growth:
            found.append(f"{title}: grew by {grown:.1f} in the second half, and may by {max_growth:g}")
    ended = {end for _, end in counts}
    found += [f"{counts[key]} times {key[0]} {key[1]}" for key in counts if key[1] not in ("answered", "left")]
    found += [f"no request was {end}" for end in ("answered", "left") if end not in ended]
    if not any(sample.values[WAITING] for sample in samples):
        found.append("no request ever had to wait: the server was not saturated")
    return found


def print_tables(samples: list[Sample], counts: Counter) -> None:
    console = Console(highlight=False)
    table = Table("requests", "answered", "clients left", "other", box=box.SIMPLE_HEAD)
    for kind in KINDS:
        ends = Counter({end: count for (of, end), count in counts.items() if of == kind})
        other = ends.total() - ends["answered"] - ends["left"]
        table.add_row(kind, str(ends["answered"]), str(ends["left"]), str(other))
    console.print(table)
    half = samples[len(samples) // 2]
    table = Table("", "before", "in the middle", "most", "after", "growth of the second half", box=box.SIMPLE_HEAD)
    for title, name in (COUNTS | MEMORY).items():
        unit = 2**20 if title in MEMORY else 1
        shown = [first.values[name] / unit for first in (samples[0], half, samples[-1])]
        most = max(sample.values[name] for sample in samples) / unit
        grown = f"{growth(samples, name):+.1f}" if title in MEMORY else ""
        table.add_row(title, f"{shown[0]:.0f}", f"{shown[1]:.0f}", f"{most:.0f}", f"{shown[2]:.0f}", grown)
    console.print(table)
    waiting = sum(sample.values[WAITING] for sample in samples) / len(samples)
    console.print(f"  {counts.total()} requests in {samples[-1].at:.0f} s; {waiting:.1f} waited on average")


@contextlib.contextmanager
def served(flags: list[str]) -> Iterator[tuple[str, Path]]:
    """The address of a server, and the file of its log."""
    command = [sys.executable, "-m", "jaxserve.cli.main", "serve", "--port", "0", "--log-level", "warning"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise SystemExit(f"the server has not started:\n{log.read_text()}")
            yield line.split()[-1], log
        finally:
            process.terminate()
            process.wait()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=48, help="at the same time (default: 48)")
    parser.add_argument("--max-growth", type=float, default=16.0, help="of each process' memory, MiB (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="flags of jaxserve serve, after --")
    arguments = parser.parse_args(words)
    with served([*ENGINE, *SERVER, *arguments.flags]) as (url, log):
        samples, counts = asyncio.run(soak(url, 60 * arguments.minutes, arguments.clients, arguments.seed))
        print_tables(samples, counts)
        found = failures(samples, counts, arguments.max_growth)
        if errors := log.read_text().count("Traceback"):
            found.append(f"the server's log has {errors} tracebacks: {log.read_text()[-2000:]}")
    if found:
        raise SystemExit("It leaks, or fails:\n" + "\n".join(f"- {sentence}" for sentence in found))
    print("Nothing leaks.")


if __name__ == "__main__":
    main()
