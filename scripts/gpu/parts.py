"""The parts, in the order in which they run."""

import dataclasses
import importlib
import os
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Part:
    """A module with `facts() -> dict` and `cases(clock, ceilings, folder) -> Iterator[Case]`; `weight` shares out time.

    What is in `folder` is there again in the process that goes on behind a case which ended the one before.
    """

    module: str
    weight: float
    summary: str
    xla_flags: str = ""

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def environment(self, device: str, folder: str) -> dict[str, str]:
        """Of the part's own processes, which have `folder` to themselves."""
        flags = self.xla_flags.format(folder=folder)
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        # Named, a GPU that JAX finds and cannot start is an error; left to itself, JAX would go on on the CPU.
        return environment | {"JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu"}


# The engine's process also writes down what XLA makes of each decode program, and keeps CUDA graphs on under a trace:
# both answer whether steps are replayed as graphs.
_SHOW_GRAPHS = (
    "--xla_dump_to={folder}/dump --xla_dump_hlo_module_re=jit_decode --xla_enable_command_buffers_during_profiling=true"
)

PARTS = {
    "correctness": Part("scripts.gpu.correctness", 20, "every kernel against numpy in float64"),
    "ceilings": Part("scripts.gpu.ceilings", 4, "read and copy bandwidth, rate of bf16 products"),
    "kernels": Part("scripts.gpu.kernels", 28, "every kernel's time and share, beside XLA, Triton and cuDNN"),
    "torch": Part("scripts.gpu.torch_attention", 6, "PyTorch's attention on the same shapes, where it is installed"),
    "engine": Part(
        "scripts.gpu.engine", 42, "Qwen3-8B's shape: start, steps, host gap, CUDA graphs, throughput", _SHOW_GRAPHS
    ),
}
