"""`jaxserve bench host`: what a decode step costs beside the device's work."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Parser

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

_SEQUENCES = (64, 256, 1024, 4096)


def parser() -> Parser:
    parser = Parser(
        "bench host",
        "Run decode steps on a simulated device that answers at once, and print what a step costs the host:\n"
        "scheduling, packing the batch and taking its tokens, without text. Once with nothing given out before a\n"
        "completion ends, as generate does it, and once with every token given out, as in streams.",
        examples=("jaxserve bench host", "jaxserve bench host --steps 1000 --output-json host.json"),
    )
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="steps to measure (default: 300)")
    parser.add_argument("--output-json", metavar="FILE", help="write the numbers and the machine to this file")
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console  # on demand, as JAX comes with these

    from jaxserve.cli import machine
    from jaxserve.cli.bench.report import milliseconds, statistics_table
    from jaxserve.cli.bench.session import write_report

    table = statistics_table("host milliseconds a decode step")
    rows: list[dict[str, Any]] = []
    for stream in (False, True):
        for sequences in _SEQUENCES:
            found = host_seconds(sequences, arguments.steps, stream=stream)
            rows.append({"sequences": sequences, "streams": stream, "seconds": found})
            name = f"{sequences} sequences, {'streamed' if stream else 'whole'}"
            table.add_row(name, *map(milliseconds, found.values()))
    Console(highlight=False).print(table)
    report = {"benchmark": "host", "steps": rows, "host": machine.host(), "versions": machine.versions()}
    write_report(report, arguments.output_json)


def host_seconds(sequences: int, steps: int, *, stream: bool) -> dict[str, float]:
    """Statistics of the seconds that the host spends on a decode step of so many sequences."""
    from jaxserve.cli.bench.measurement import summary

    engine = decoding_engine(sequences, steps, stream=stream)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return summary(seconds) or {}


def decoding_engine(sequences: int, steps: int, *, stream: bool) -> "Engine":
    """An engine in which so many sequences decode, and go on doing so for `steps` steps."""
    from jaxserve.engine.simulation import simulated_engine
    from jaxserve.runner.simulated import CostModel
    from jaxserve.sampling_params import SamplingParams

    prompt, room = 16, 2 * steps + 1000
    engine, _ = simulated_engine(
        CostModel(),
        virtual=False,
        max_num_seqs=sequences,
        max_num_batched_tokens=8192,
        max_model_len=room,
        num_pages=sequences * (room // 64 + 2),
        max_decode_steps=1,
    )
    params = SamplingParams(temperature=0, max_tokens=room - prompt, ignore_eos=True)
    for index in range(sequences):
        # Prompts of their own: nothing is shared, and no two cross into a new page because of one another.
        ids = {"prompt_token_ids": [index % 30_000 + 1] * (prompt + index % 60)}
        engine.add(engine.inputs.check(ids, params), params, request_id=str(index), stream=stream)
    while engine.scheduler.num_waiting:
        engine.step()
    for _ in range(3):
        engine.step()
    return engine
