"""`jaxserve bench serve`: streams over HTTP, and what they cost beside the same requests without it."""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from jaxserve.cli.bench.http_streams import Stream, run_streams
from jaxserve.cli.bench.workload import BenchRequest, Workload, add_workload_flags, positive
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import TEXT_ENGINE, add_engine_flags, engine_config, start_llm
from jaxserve.config import EngineConfig
from jaxserve.errors import InputError

_VOCABULARY = 1000  # token ids that prompts are made of: every model has these, and a server does not tell how many
_WARM_UP = [BenchRequest([1] * 8, 8)] * 4
_SETTINGS = {"temperature": 0, "ignore_eos": True}


def parser() -> Parser:
    parser = Parser(
        "bench serve",
        "Send many streams at once to a server, and print what came out of it a second and how long its users\n"
        "waited. The server is started for this, with as many places in the batch as there are streams unless\n"
        "--max-num-seqs says otherwise, or is one that runs (--url). Prompts are token ids, and completions go on\n"
        "after end-of-sequence, so that every run does the same work.",
        examples=(
            "jaxserve bench serve --streams 64",
            "jaxserve bench serve --model ~/models/Qwen3-8B --streams 256 --num-prompts 1024 --compare-offline",
            "jaxserve bench serve --url http://localhost:8000 --input-len 1024 --output-len 256",
        ),
    )
    add_workload_flags(parser, "--num-prompts", 256, input_len=128, output_len=128)
    parser.add_argument(
        "--streams", type=positive, default=256, metavar="N", help="requests at the same time (default: 256)"
    )
    parser.add_argument("--url", metavar="URL", help="server to measure, such as http://localhost:8000")
    parser.add_argument(
        "--compare-offline",
        action="store_true",
        help="run the same requests through LLM as well, on the same settings, and print HTTP's share of its speed",
    )
    add_engine_flags(parser, TEXT_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    workload, random = Workload(arguments), np.random.default_rng(config.seed)
    requests = workload.draw(_VOCABULARY, random)
    with contextlib.nullcontext(arguments.url) if arguments.url else _server(config) as url:
        model = _model(url)
        _run_http(url, model, _WARM_UP, len(_WARM_UP))
        streams = _run_http(url, model, requests, arguments.streams)
    report: dict[str, Any] = {"benchmark": "serve", "model": model, "streams": arguments.streams}
    if not arguments.url:
        report["settings"] = dataclasses.asdict(config)

    from jaxserve.cli import machine  # on demand, as JAX comes with these
    from jaxserve.cli.bench.report import print_served
    from jaxserve.cli.bench.session import write_report

    report |= {"workload": workload.source, **_numbers(streams)}
    if arguments.compare_offline:
        report["offline"] = _offline(config, requests)
        report["share_of_offline"] = report["output_tokens_per_second"] / report["offline"]["output_tokens_per_second"]
    report |= {"host": machine.host(), "versions": machine.versions()}
    print_served(report)
    write_report(report, arguments.output_json)


def _config(arguments: argparse.Namespace) -> EngineConfig:
    if arguments.url and arguments.compare_offline:
        raise InputError("--url and --compare-offline were both given; compare with a server that is started for it")
    config = engine_config(arguments, TEXT_ENGINE)
    return dataclasses.replace(config, max_num_seqs=config.max_num_seqs or arguments.streams)


@contextlib.contextmanager
def _server(config: EngineConfig) -> Iterator[str]:
    """The address of a server on these settings, which ends with the block."""
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    command = [sys.executable, "-m", "jaxserve.cli.main", "serve", "--port", "0", "--log-level", "warning", "--config"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as preset:
        yaml.safe_dump(given, preset)
        preset.flush()
        with subprocess.Popen([*command, preset.name], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                yield _address(process.stdout.readline())
            finally:
                process.terminate()


def _address(line: str) -> str:
    """Of a server's first line, which says where it is."""
    if not line:
        raise InputError("the server has not started; what it said is above")
    return line.split()[-1]


def _model(url: str) -> str:
    """What a server's model is called."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=60) as response:
            return json.load(response)["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"no server of OpenAI's API answers at {url} ({error}); start one there") from None


def _run_http(url: str, model: str, requests: Sequence[BenchRequest], streams: int) -> list[Stream]:
    bodies = [
        {"model": model, "prompt": request.prompt_token_ids, "max_tokens": request.max_tokens} | _SETTINGS
        for request in requests
    ]
    gc.collect()
    return asyncio.run(run_streams(url, bodies, streams))


def _numbers(streams: Sequence[Stream]) -> dict[str, Any]:
    """Of a run: rates, and statistics of what its requests waited."""
    from jaxserve.cli.bench.measurement import rates, summary

    seconds = max(stream.arrivals[-1] for stream in streams) - min(stream.sent for stream in streams)
    prompt, output = sum(s.prompt_tokens for s in streams), sum(s.output_tokens for s in streams)
    each = [(s.arrivals[-1] - s.arrivals[0]) / (s.output_tokens - 1) for s in streams if s.output_tokens > 1]
    return rates(len(streams), prompt, output, seconds) | {
        "ttft_seconds": summary(s.arrivals[0] - s.sent for s in streams),
        "itl_seconds": summary(gap for s in streams for gap in np.diff(s.arrivals).tolist()),
        "tpot_seconds": summary(each),
        "end_to_end_seconds": summary(s.arrivals[-1] - s.sent for s in streams),
    }


def _offline(config: EngineConfig, requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """The same requests, all at once, by an engine in this process, which gives out each completion at its end."""
    from jaxserve.cli.bench.measurement import token_rates
    from jaxserve.sampling_params import SamplingParams

    def run(requests: Sequence[BenchRequest]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
        params = [SamplingParams(max_tokens=request.max_tokens, **_SETTINGS) for request in requests]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        return token_rates(outputs, time.perf_counter() - start)

    with start_llm(config) as llm:
        run(_WARM_UP)
        return run(requests)
