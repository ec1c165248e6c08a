"""A compiler for an H200 that is not there: XLA:GPU and Mosaic GPU down to machine code. Nothing runs.

Wants JAX_PLATFORMS=cpu and XLA_FLAGS=--xla_gpu_autotune_level=0, for there is no device to time anything on: which
kernel a matrix product gets says nothing about the real one.
"""

import dataclasses
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_canonicalize = xla_bridge.canonicalize_platform


def _canonicalize_without_gpu(platform: str) -> str:
    try:
        return _canonicalize(platform)
    except RuntimeError:
        if platform == "gpu":  # no GPU is live here, yet kernels are lowered for one
            return "cuda"
        raise


xla_bridge.canonicalize_platform = _canonicalize_without_gpu

_topology = topologies.get_topology_desc(
    platform="cuda", target_config=(Path(__file__).parent / "h200.txtpb").read_text(), topology="1x1x1"
)
MESH = Mesh(np.array(_topology.devices), ("tensor",))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one Mosaic kernel."""

    name: str
    registers: int
    spilled_bytes: int
    serialized: bool  # its matrix instructions wait for each other where they were meant to overlap


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, and the Mosaic kernels that were compiled for it: each once, however often it is called."""

    program: jax.stages.Compiled
    kernels: list[Kernel]
    thunks: str  # XLA's list of what the program has a GPU do

    @property
    def text(self) -> str:
        return self.program.as_text()

    @property
    def mosaic_calls(self) -> Counter[str]:
        """How often the program calls each Mosaic kernel, by name."""
        return Counter(re.findall(r'custom_call_target="mosaic_gpu_v2".*?/(\w+)/mpmd_map"', self.text))

    def operands(self, kernel: str) -> list[list[str]]:
        """Names of what each call of a Mosaic kernel reads."""
        calls = re.findall(rf"custom-call\((.*?)\), custom_call_target=.*/{kernel}/mpmd_map", self.text)
        return [re.findall(r"%[\w.-]+", call) for call in calls]


_whole = NamedSharding(MESH, PartitionSpec())


def on_h200(tree: Any) -> Any:
    """The shapes of a tree of arrays, as arguments on the absent H200."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_whole), tree)


def compile_for_h200(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """Compile `function`; raises what XLA, Mosaic or ptxas raise."""
    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(MOSAIC_GPU_DUMP_TO=dump, MOSAIC_GPU_DUMP_PTXAS="1")
        with jax.sharding.use_abstract_mesh(MESH.abstract_mesh):
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=_whole)
            program = jitted.lower(*arguments).compile(compiler_options={"xla_dump_to": dump})
        thunks = "".join(path.read_text() for path in Path(dump).glob("*thunk_sequence_after_thunk_passes.txt"))
        kernels = [_kernel(path) for path in sorted(Path(dump).glob("*.ptxas"))]
        return Compiled(program, kernels, thunks)


def _kernel(path: Path) -> Kernel:
    log = path.read_text()
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers, log
    assert spilled, log
    serialized = "wgmma.mma_async instructions are serialized" in log
    return Kernel(path.stem, int(registers[1]), int(spilled[1]), serialized)
