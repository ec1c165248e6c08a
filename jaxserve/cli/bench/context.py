"""`jaxserve bench context`: what long contexts cost, alone and for those beside them."""

import argparse
import collections
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli.bench.workload import BenchRequest, positive, run_requests
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import BENCH_ENGINE, add_engine_flags, engine_config, start_llm
from jaxserve.config import DEMO_MODEL
from jaxserve.errors import InputError

if TYPE_CHECKING:
    from jaxserve.llm import LLM

_LENGTHS = (1024, 8192, 32768, 131_072)
_SETTLED = 30  # tokens of the short requests after which the engine knows how long its steps take
_SHORT_PROMPT = 16


def parser() -> Parser:
    parser = Parser(
        "bench context",
        "Run one request of each prompt length alone, then the longest beside short ones that are decoding, and print\n"
        "the time of its prompt, the time per token after it with the share of the memory's bandwidth, and how long\n"
        "the short ones waited for a token, and for the same tokens alone. Without --model it is the demo model, told\n"
        "that it has as many positions as it takes: what it writes there is of no use, what it costs is.",
        examples=(
            "jaxserve bench context",
            "jaxserve bench context --length 1024 --length 8192 --output-len 16",
            "jaxserve bench context --model ~/models/Qwen3-8B --length 32768 --beside 16 --max-itl-ms 50",
        ),
    )
    parser.add_argument(
        "--length",
        action="append",
        type=positive,
        metavar="N",
        help=f"tokens of a prompt; repeat the flag for several (default: {', '.join(map(str, _LENGTHS))})",
    )
    parser.add_argument(
        "--output-len", type=positive, default=32, metavar="N", help="tokens of each completion (default: 32)"
    )
    parser.add_argument(
        "--beside",
        type=positive,
        default=3,
        metavar="N",
        help="short requests that decode while the longest prompt is computed (default: 3)",
    )
    parser.add_argument("--output-json", metavar="FILE", help="write all numbers and the machine to this file")
    add_engine_flags(parser, BENCH_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from jaxserve.cli import machine  # on demand, as JAX comes with these
    from jaxserve.cli.bench.bandwidth import measure_bandwidth
    from jaxserve.cli.bench.session import say, write_report

    lengths = sorted(arguments.length or _LENGTHS)
    longest = lengths[-1] + arguments.output_len
    config = dataclasses.replace(engine_config(arguments, BENCH_ENGINE), skip_tokenizer_init=True)
    if (config.max_model_len or longest) < longest:
        raise InputError(
            f"max_model_len is {config.max_model_len}, and the longest request takes {longest} tokens; leave it out"
        )
    say("Measuring the memory's bandwidth ...")
    memory = measure_bandwidth(config.tensor_parallel_size)
    with contextlib.ExitStack() as stack:
        max_model_len = config.max_model_len or longest
        model = config.model or stack.enter_context(_stretched_demo_model(max_model_len))
        max_num_seqs = config.max_num_seqs or arguments.beside + 1
        config = dataclasses.replace(config, model=model, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
        say("Starting the engine ...")
        llm = stack.enter_context(start_llm(config))
        alone = []
        for length in lengths:
            say(f"Running a prompt of {length} tokens ...")
            alone.append(_alone(llm, length, arguments.output_len, memory["bytes_per_second"]))
        say(f"Running a prompt of {lengths[-1]} tokens beside {arguments.beside} short ones ...")
        report = {
            "benchmark": "context",
            "model": llm.engine.config.model,
            "settings": dataclasses.asdict(llm.engine.config),
            "alone": alone,
            "beside": _beside(llm, lengths[-1], arguments.beside),
            "temporary_bytes": llm.engine.runner.temporary_bytes,
            "memory": memory,
            "host": machine.host(),
            "devices": machine.devices(),
            "versions": machine.versions(),
        }
    _print(report)
    write_report(report, arguments.output_json)


@contextlib.contextmanager
def _stretched_demo_model(positions: int) -> Iterator[str]:
    """The demo model's directory with a config of so many positions."""
    with tempfile.TemporaryDirectory() as directory:
        for file in DEMO_MODEL.iterdir():
            (Path(directory) / file.name).symlink_to(file)
        path = Path(directory) / "config.json"
        fields = json.loads(path.read_text()) | {"max_position_embeddings": positions}
        path.unlink()
        path.write_text(json.dumps(fields))
        yield directory


def _prompt(llm: "LLM", length: int, seed: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(seed).integers(llm.engine.model_config.vocab_size, size=length).tolist()


def _alone(llm: "LLM", length: int, output_len: int, memory_bytes_per_second: float) -> dict[str, Any]:
    from jaxserve.cli.bench.bandwidth import decode_bandwidth
    from jaxserve.cli.bench.measurement import StepRecorder

    engine = llm.engine
    recorder = StepRecorder([kind.window for kind in engine.model_config.layer_kinds])
    engine.on_step = recorder
    recorder.begin()
    run_requests(llm, [BenchRequest(_prompt(llm, length, seed=length), output_len)])
    engine.on_step = None
    seconds = sum(step.seconds for step in recorder.steps if not step.decode)
    decode = decode_bandwidth(
        recorder.steps,
        weight_bytes=engine.runner.weight_bytes_per_step,
        kv_bytes_per_token=engine.runner.kv_bytes_per_token,
        memory_bytes_per_second=memory_bytes_per_second,
    )
    return {"prompt_tokens": length, "prefill_seconds": seconds, "decode": decode}


class _Streams:
    """Short requests that decode side by side, and how long each waited for what it was given."""

    def __init__(self, llm: "LLM", count: int, max_tokens: int):
        from jaxserve.sampling_params import SamplingParams

        self._engine = llm.engine
        self.waits: list[float] = []
        self._seen: dict[str, float] = {}
        self._tokens: collections.Counter[str] = collections.Counter()
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._ids = [f"short {number}" for number in range(count)]
        for number, request_id in enumerate(self._ids):
            prompt = {"prompt_token_ids": _prompt(llm, _SHORT_PROMPT, seed=number)}
            self._engine.add(self._engine.inputs.check(prompt, params), params, request_id=request_id)

    def run(self, until: Callable[[set[str]], bool]) -> int:
        """Step until that holds of the requests that were given tokens; how many tokens every short one has then."""
        self.waits, given = [], set[str]()
        while not until(given):
            deltas = self._engine.step()
            now = time.perf_counter()
            given = {delta.request_id for delta in deltas}
            self.waits += [now - self._seen[request_id] for request_id in given & self._seen.keys()]
            self._seen |= dict.fromkeys(given.intersection(self._ids), now)
            self._tokens.update({delta.request_id: len(delta.outputs[0].token_ids) for delta in deltas})
        return self.tokens

    @property
    def tokens(self) -> int:
        return min(self._tokens[request_id] for request_id in self._ids)

    def abort(self) -> None:
        for request_id in self._ids:
            self._engine.abort(request_id)


def _beside(llm: "LLM", length: int, count: int) -> dict[str, Any]:
    """How long `count` short requests wait between two tokens while a prompt of `length` is computed, and how long for
    the same tokens while none is: every token costs more than the one before it.
    """
    from jaxserve.cli.bench.measurement import summary
    from jaxserve.sampling_params import SamplingParams

    engine = llm.engine
    limit = min(engine.config.max_model_len - _SHORT_PROMPT, length)
    settled = min(_SETTLED, limit // 6)
    beside = _Streams(llm, count, limit)
    begun = beside.run(lambda given: beside.tokens >= settled)
    prompt, one = _prompt(llm, length, seed=2**32 - 1), SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    start = time.perf_counter()
    engine.add(engine.inputs.check({"prompt_token_ids": prompt}, one), one, request_id="long")
    ended = beside.run(lambda given: "long" in given)
    seconds = time.perf_counter() - start
    beside.abort()
    alone = _Streams(llm, count, limit)
    alone.run(lambda given: alone.tokens >= begun)
    alone.run(lambda given: alone.tokens >= ended)
    alone.abort()
    return {
        "prompt_tokens": length,
        "short_requests": count,
        "short_tokens": ended - begun,
        "prefill_seconds": seconds,
        "waits_seconds": summary(beside.waits),
        "waits_alone_seconds": summary(alone.waits),
    }


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("context", "prompt s", "tokens/s", "ms/token", "MB/token", "GB/s", "of memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["alone"]:
        prefill = (f"{row['prompt_tokens']}", f"{row['prefill_seconds']:.2f}")
        rate = f"{row['prompt_tokens'] / row['prefill_seconds']:.0f}"
        decode = row["decode"]
        decoded = decode and (
            f"{1000 * decode['step_seconds']:.2f}",
            f"{decode['bytes_per_step'] / 1e6:.1f}",
            f"{decode['bytes_per_second'] / 1e9:.2f}",
            f"{100 * decode['share_of_memory_bandwidth']:.1f}%",
        )
        table.add_row(*prefill, rate, *(decoded or ()))
    console = Console(highlight=False)
    console.print(table)
    beside, memory = report["beside"], report["memory"]
    if (waits := beside["waits_seconds"]) and (alone := beside["waits_alone_seconds"]):
        console.print(
            f"  Beside {beside['short_requests']} short requests the prompt of {beside['prompt_tokens']} tokens took "
            f"{beside['prefill_seconds']:.2f} s.\n"
            f"  They waited {_waits(waits)} for each of {beside['short_tokens']} tokens meanwhile, and {_waits(alone)} "
            f"for the same tokens alone.",
            soft_wrap=True,
        )
    if report["temporary_bytes"] is not None:
        console.print(
            f"  No program needs more than {report['temporary_bytes'] / 1e6:.1f} MB beside weights and pages."
        )
    console.print(
        f"  The memory gives {memory['bytes_per_second'] / 1e9:.2f} GB/s: {memory['probe']}.",
        soft_wrap=True,
    )


def _waits(seconds: dict[str, float]) -> str:
    return f"{1000 * seconds['median']:.1f} ms (p95 {1000 * seconds['p95']:.1f})"
