"""`jaxserve bench load`: a checkpoint's weights onto the devices, against `cat` of the same files."""

import argparse
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

_FLAGS = ENGINE.only("model", "revision", "hf_config_path", "dtype", "tensor_parallel_size")
_SAMPLE_SECONDS = 0.002


def parser() -> Parser:
    parser = Parser(
        "bench load",
        "Load a checkpoint's weights again and again, in turn with `cat` of the same files, which are in the page\n"
        "cache by then. Print the rate of both, and the host memory that loading took beyond what stays.",
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

    from jaxserve.checkpoint.huggingface import read_config
    from jaxserve.checkpoint.model_files import find_model
    from jaxserve.cli.bench.session import write_report
    from jaxserve.config import DEMO_MODEL
    from jaxserve.engine.startup import serving_dtype
    from jaxserve.models.registry import model_config
    from jaxserve.parallel.mesh import make_mesh

    config = engine_config(arguments, _FLAGS)
    files = find_model(config.model or str(DEMO_MODEL), revision=config.revision, hf_config_path=config.hf_config_path)
    hf = read_config(files.config)
    model, mesh = model_config(hf), make_mesh(config.tensor_parallel_size)
    on_host = mesh.devices.flat[0].platform == "cpu"
    weights = sorted(files.weights.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{files.weights} holds no safetensors files; give a HuggingFace model directory")
    read_bytes = sum(path.stat().st_size for path in weights)
    cat, load, beyond = [], [], []
    for _ in range(1 + arguments.num_iters):  # the first brings the files into the page cache
        cat.append(_cat_seconds(weights))
        with PeakMemory() as memory:
            start = time.perf_counter()
            _, state = files.load_weights(model, mesh, serving_dtype(config.dtype, hf))
            load.append(time.perf_counter() - start)
        arrays = jax.tree.leaves(state)
        shards = [shard.data.nbytes for array in arrays for shard in array.addressable_shards]
        beyond.append(memory.peak_bytes - (sum(array.nbytes for array in arrays) if on_host else 0))
        for array in arrays:
            array.delete()
    report = {
        "benchmark": "load",
        "model": files.name,
        "devices": mesh.devices.size,
        "file_bytes": read_bytes,
        "cat_seconds": cat[1:],
        "load_seconds": load[1:],
        "cat_bytes_per_second": read_bytes / min(cat[1:]),
        "load_bytes_per_second": read_bytes / min(load[1:]),
        "share_of_cat": min(cat[1:]) / min(load[1:]),
        "largest_shard_bytes": max(shards),
        "host_bytes_beyond_weights": max(beyond),
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
    def rate(name: str) -> str:
        seconds, best = report[f"{name}_seconds"], report[f"{name}_bytes_per_second"]
        return f"{best / 1e9:.2f} GB/s, best of {len(seconds)} ({min(seconds):.3f} to {max(seconds):.3f} s)"

    devices = f"{report['devices']} device{'s' * (report['devices'] > 1)}"
    print(f"{Path(report['model']).name}: {report['file_bytes'] / 1e6:.1f} MB onto {devices}")
    print(f"  cat     {rate('cat')}")
    print(f"  load    {rate('load')}, {100 * report['share_of_cat']:.0f}% of cat")
    print(
        f"  memory  {report['host_bytes_beyond_weights'] / 1e6:.1f} MB beyond what stays; "
        f"the largest shard has {report['largest_shard_bytes'] / 1e6:.1f} MB"
    )
