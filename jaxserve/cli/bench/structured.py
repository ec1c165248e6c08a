"""`jaxserve bench structured`: what constrained requests cost those beside them."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import TEXT_ENGINE, add_engine_flags, engine_config, start_llm
from jaxserve.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from jaxserve.llm import LLM

# An answer to it does not end before its tokens do.
_SCHEMA = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}


def parser() -> Parser:
    parser = Parser(
        "bench structured",
        "Run free requests alone, beside as many free ones, and beside as many that follow a JSON schema, in turns,\n"
        "and print the time per token of the first of them in each. Prompts are random token ids, and completions\n"
        "go on after end-of-sequence, so that every run does the same work.",
        examples=(
            "jaxserve bench structured",
            "jaxserve bench structured --model ~/models/Qwen3-8B --requests 64 --output-len 256 --rounds 3",
        ),
    )
    for flag, default, what in (
        ("--requests", 16, "free requests, and as many beside them"),
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 128, "tokens of each completion"),
        ("--rounds", 7, "times that each of the three runs is measured"),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--output-json", metavar="FILE", help="write all numbers and the machine to this file")
    add_engine_flags(parser, TEXT_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    import numpy as np  # on demand, as JAX comes with these

    from jaxserve.cli import machine
    from jaxserve.cli.bench.measurement import summary
    from jaxserve.cli.bench.session import say, write_report

    count, rounds = arguments.requests, arguments.rounds
    if arguments.output_len < 2:
        raise InputError("--output-len is 1, and there is no time between fewer than two tokens; give more")
    config = engine_config(arguments, TEXT_ENGINE)
    config = dataclasses.replace(
        config,
        max_num_seqs=config.max_num_seqs or 2 * count,
        max_model_len=config.max_model_len or arguments.input_len + arguments.output_len,
    )
    say("Starting the engine ...")
    with start_llm(config) as llm:
        llm.engine.grammars.prepare()
        random = np.random.default_rng(llm.engine.config.seed)
        runs = {"alone": (0, 0), "beside free": (count, 0), "beside constrained": (0, count)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(1 + rounds):  # the first warms up
            say(f"Round {number} of {rounds} ..." if number else "Warming up ...")
            for name, (free, constrained) in runs.items():
                found = _seconds_per_token(llm, random, count, free, constrained, arguments)
                seconds[name] += found if number else []
        report = {
            "benchmark": "structured",
            "model": llm.engine.config.model,
            "settings": dataclasses.asdict(llm.engine.config),
            "requests": count,
            "input_len": arguments.input_len,
            "output_len": arguments.output_len,
            "rounds": rounds,
            "tpot_seconds": {name: summary(found) for name, found in seconds.items()},
            "host": machine.host(),
            "devices": machine.devices(),
            "versions": machine.versions(),
        }
    _print(report)
    write_report(report, arguments.output_json)


def _seconds_per_token(
    llm: "LLM", random: "np.random.Generator", count: int, free: int, constrained: int, arguments: argparse.Namespace
) -> list[float]:
    """Of each of `count` free requests, beside so many further free ones and constrained ones."""
    from jaxserve.cli.bench.measurement import seconds_per_token
    from jaxserve.sampling_params import SamplingParams

    llm.engine.pool.forget()
    vocab_size = llm.engine.model_config.vocab_size
    plain = {"temperature": 1.0, "max_tokens": arguments.output_len, "ignore_eos": True}
    bound = SamplingParams(**plain, structured_outputs={"json": _SCHEMA})
    params = [SamplingParams(**plain)] * (count + free) + [bound] * constrained
    prompts = [{"prompt_token_ids": random.integers(vocab_size, size=arguments.input_len).tolist()} for _ in params]
    outputs = llm.generate(prompts, params)[:count]
    return [seconds for output in outputs if (seconds := seconds_per_token(output)) is not None]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    from jaxserve.cli.bench.report import milliseconds, statistics_table

    count, times = report["requests"], report["tpot_seconds"]
    table = statistics_table("milliseconds per token")
    for name, found in times.items():
        table.add_row(f"{count} free, {name.replace('beside', f'beside {count}')}", *map(milliseconds, found.values()))
    Console(highlight=False).print(table)
    more = times["beside constrained"]["median"] / times["beside free"]["median"] - 1
    kind = "more" if more > 0 else "less"
    print(f"  Beside constrained requests a token takes {abs(more):.1%} {kind} time than beside free ones (medians).")
