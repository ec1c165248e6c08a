"""What both benchmarks have in common: an engine to measure, and a report of what it did."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxserve.cli import machine
from jaxserve.cli.bench.bandwidth import decode_bandwidth, measure_bandwidth
from jaxserve.cli.bench.measurement import StepRecorder, request_times, step_times, summary, token_rates
from jaxserve.cli.bench.workload import BenchRequest, Workload, check_lengths, run_requests
from jaxserve.cli.options import BENCH_ENGINE, engine_config, start_llm
from jaxserve.errors import InputError
from jaxserve.outputs import RequestOutput
from jaxserve.runner.compilation import compilations
from jaxserve.runner.memory import reserve_gpu_memory


class Session:
    """An engine that a benchmark runs on. A context manager; leaving it frees the device's memory."""

    def __init__(self, arguments: argparse.Namespace):
        self._workload = Workload(arguments)
        if arguments.output_json and not Path(arguments.output_json).parent.is_dir():
            raise InputError(f"there is no folder for {arguments.output_json}; make it first")
        config = dataclasses.replace(engine_config(arguments, BENCH_ENGINE), skip_tokenizer_init=True)
        say("Measuring the memory's bandwidth ...")
        reserve_gpu_memory(config.gpu_memory_utilization)  # before JAX starts, which is now
        self._memory = measure_bandwidth(config.tensor_parallel_size)
        say("Starting the engine ...")
        compiled, cached = compilations.count, compilations.cached + compilations.loaded
        loaded, start = compilations.loaded, time.perf_counter()
        self.llm = start_llm(config)
        say(self.llm.engine.attention)
        self._startup = {
            "attention": self.llm.engine.attention,
            "seconds": time.perf_counter() - start,
            "stage_seconds": self.llm.engine.startup_seconds,
            "compile_seconds": self.llm.engine.startup_seconds["programs"],
            "programs_compiled": compilations.count + compilations.loaded - compiled - loaded,
            "of_these_from_cache": compilations.cached + compilations.loaded - cached,
        }
        self._profile = arguments.profile
        self._random = np.random.default_rng(config.seed)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.llm.close()

    def draw(self) -> list[BenchRequest]:
        """The workload; random prompts are others at each call."""
        requests = self._workload.draw(self.llm.engine.model_config.vocab_size, self._random)
        check_lengths(requests, self.llm.engine.config.max_model_len)
        return requests

    def measure(self, batches: Sequence[list[BenchRequest]]) -> dict[str, Any]:
        """Run one batch after the other, all of its requests at once; returns the report."""
        engine = self.llm.engine
        recorder = StepRecorder([kind.window for kind in engine.model_config.layer_kinds])
        outputs: list[RequestOutput] = []
        seconds: list[float] = []
        compiled = compilations.count
        engine.on_step = recorder
        before = dataclasses.asdict(engine.meter.host_seconds)
        with jax.profiler.trace(self._profile, create_perfetto_trace=True) if self._profile else nullcontext():
            for number, batch in enumerate(batches):
                count = f"{len(batch)} request{'s' * (len(batch) > 1)}"
                say(
                    f"Running {count}, {number + 1} of {len(batches)} ..."
                    if len(batches) > 1
                    else f"Running {count} ..."
                )
                engine.pool.forget()  # or a repeated batch would find its own prompts computed
                recorder.begin()
                start = time.perf_counter()
                outputs += run_requests(self.llm, batch)
                seconds.append(time.perf_counter() - start)
        engine.on_step = None
        host = {name: value - before[name] for name, value in dataclasses.asdict(engine.meter.host_seconds).items()}
        lengths = [(len(request.prompt_token_ids), request.max_tokens) for batch in batches for request in batch]
        return {
            "model": engine.config.model,
            "settings": dataclasses.asdict(engine.config),
            "workload": {
                "source": self._workload.source,
                "batches": len(batches),
                "requests_per_batch": len(batches[0]),
                "mean_prompt_tokens": float(np.mean([prompt for prompt, _ in lengths])),
                "mean_output_tokens": float(np.mean([output for _, output in lengths])),
            },
            "startup": self._startup,
            "compilations_after_warm_up": compilations.count - compiled,
            **token_rates(outputs, sum(seconds)),
            "batch_seconds": summary(seconds),
            **request_times(outputs),
            "steps": step_times(recorder.steps),
            "host_seconds": host,
            "bandwidth": {
                "memory": self._memory,
                "decode": decode_bandwidth(
                    recorder.steps,
                    weight_bytes=engine.runner.weight_bytes_per_step,
                    kv_bytes_per_token=engine.runner.kv_bytes_per_token,
                    memory_bytes_per_second=self._memory["bytes_per_second"],
                ),
            },
            "host": machine.host(),
            "devices": machine.devices(),
            "versions": machine.versions(),
        }


def write_report(report: dict[str, Any], file: str | None) -> None:
    """Write the report as JSON, if a file was asked for."""
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {file} ({error.strerror})") from error


def say(text: str) -> None:
    """Progress, apart from the results on standard output."""
    print(text, file=sys.stderr, flush=True)
