"""`jaxserve bench load`: a checkpoint's weights onto the devices, against `cat` of the same files."""

import argparse
import gc
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import ENGINE, add_engine_flags, engine_config
from jaxserve.errors import InputError

_FLAGS = ENGINE.only("model", "revision", "hf_config_path", "dtype", "quantization", "tensor_parallel_size")
_SAMPLE_SECONDS = 0.002


def parser() -> Parser:
    parser = Parser(
        "bench load",
        "Load a checkpoint's weights again and again, in turn with `cat` of the same files, which are in the page\n"
        "cache by then. Print the rate of both, and the host memory that loading took beyond what stays. The model's\n"
        "structure, which programs are compiled from meanwhile, is made before and timed apart.",
        examples=(
            "jaxserve bench load --model ~/models/Qwen3-8B",
            "JAX_NUM_CPU_DEVICES=4 jaxserve bench load --model ~/models/Qwen3-0.6B --tensor-parallel-size 4",
        ),
    )
    parser.add_argument("--num-iters", type=positive, default=5, metavar="N", help="times that each runs (default: 5)")
    parser.add_argument("--output-json", metavar="FILE", help="write all numbers to this file")
    add_engine_flags(parser, _FLAGS)
    return parser


def run(arguments: argparse.Namespace) -> None:
    import jax  # on demand, as everything that it comes with

    from jaxserve.checkpoint.huggingface import abstract_model
    from jaxserve.cli.bench.session import write_report
    from jaxserve.engine.served_model import served_model
    from jaxserve.parallel.mesh import make_mesh

    config = engine_config(arguments, _FLAGS)
    files, _, model, dtype = served_model(config, with_weights=True)
    mesh = make_mesh(config.tensor_parallel_size)
    weights = sorted(files.weights.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{files.weights} holds no safetensors files; give a HuggingFace model directory")
    read_bytes = sum(path.stat().st_size for path in weights)
    start = time.perf_counter()
    abstract_model(model.over_tensor_axis(config.tensor_parallel_size), dtype)
    structure_seconds = time.perf_counter() - start
    cat_seconds, load_seconds = [], []
    for _ in range(1 + arguments.num_iters):  # the first brings the files into the page cache
        cat_seconds.append(_cat_seconds(weights))
        gc.collect()  # JAX gives the last arrays' memory back no sooner
        start = time.perf_counter()
        files.load_weights(model, mesh, dtype)
        load_seconds.append(time.perf_counter() - start)
    gc.collect()
    with PeakMemory() as memory:  # apart from the others, as watching takes time
        _, state = files.load_weights(model, mesh, dtype)
    arrays = jax.tree.leaves(state)
    stays = sum(array.nbytes for array in arrays) if mesh.devices.flat[0].platform == "cpu" else 0
    best = {"cat": min(cat_seconds[1:]), "load": min(load_seconds[1:])}
    report = {
        "benchmark": "load",
        "model": files.name,
        "devices": mesh.devices.size,
        "file_bytes": read_bytes,
        "cat_seconds": cat_seconds[1:],
        "structure_seconds": structure_seconds,
        "load_seconds": load_seconds[1:],
        "bytes_per_second": {name: read_bytes / seconds for name, seconds in best.items()},
        "share_of_cat": best["cat"] / best["load"],
        "largest_shard_bytes": max(shard.data.nbytes for array in arrays for shard in array.addressable_shards),
        "host_bytes_beyond_weights": memory.peak_bytes - stays,
    }
    _print(report)
    write_report(report, arguments.output_json)


class PeakMemory:
    """How far this process's own memory grows inside; pages of mapped files, which the system may take back, apart."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = 0
        self._before = _private_bytes()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._left.wait(_SAMPLE_SECONDS)
            self.peak_bytes = max(self.peak_bytes, _private_bytes() - self._before)


def _private_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise InputError("bench load reads its memory from /proc/self/status, which Linux has only") from error
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _cat_seconds(files: list[Path]) -> float:
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _print(report: dict[str, Any]) -> None:
    devices = f"{report['devices']} device{'s' * (report['devices'] > 1)}"
    print(f"{Path(report['model']).name}: {report['file_bytes'] / 1e6:.1f} MB onto {devices}")
    for name, what in (("cat", "cat of the files"), ("load", "loading")):
        seconds = report[f"{name}_seconds"]
        share = f", {100 * report['share_of_cat']:.0f}% of cat" if name == "load" else ""
        print(
            f"  {what:<16}  {report['bytes_per_second'][name] / 1e9:.2f} GB/s{share}, the best of {len(seconds)} "
            f"({min(seconds):.3f} to {max(seconds):.3f} s)"
        )
    print(f"  the model's structure, made once before, took {report['structure_seconds']:.2f} s")
    print(
        f"  host memory beyond what stays: {report['host_bytes_beyond_weights'] / 1e6:.1f} MB at most; "
        f"the largest shard has {report['largest_shard_bytes'] / 1e6:.1f} MB"
    )
