"""Which implementations of each kernel this device runs."""

from collections.abc import Callable, Iterator

from pallas_kernels import paged_attention
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.implementations import MOSAIC_GPU, XLA
from pallas_kernels.xla.grouped_matmul import grouped_matmul as grouped_matmul_xla
from pallas_kernels.xla.matmul import matmul_nk_int4
from scripts.gpu.case import NotRun
from scripts.gpu.timing import on_gpu


def attention() -> tuple[str, ...]:
    """For `implementation` of `pallas_kernels.paged_attention`."""
    return (MOSAIC_GPU, XLA) if on_gpu() else (XLA,)


def check_decode(implementation: str, shape: AttentionShape) -> None:
    """`NotRun` with the kernel's own words where it does not take `shape`."""
    _check(paged_attention.choose_decode, implementation, shape)


def check_prefill(implementation: str, shape: AttentionShape) -> None:
    """`NotRun` with the kernel's own words where it does not take `shape`."""
    _check(paged_attention.choose_prefill, implementation, shape)


def _check(choose: Callable, implementation: str, shape: AttentionShape) -> None:
    try:
        choose(implementation, shape)
    except ValueError as refusal:
        raise NotRun(str(refusal)) from refusal


def grouped_matmul() -> Iterator[tuple[str, Callable]]:
    """Each by name, as a function of tokens, weights and group sizes."""
    if on_gpu():
        from pallas_kernels.mosaic_gpu.grouped_matmul import grouped_matmul as grouped_matmul_mosaic

        yield MOSAIC_GPU, grouped_matmul_mosaic
    yield XLA, grouped_matmul_xla


def int4_matmul() -> Iterator[tuple[str, Callable]]:
    """Each by name, as a function of rows and a weight in four bits, its scales and its zeros."""
    if on_gpu():
        from pallas_kernels.mosaic_gpu.int4_matmul import int4_matmul as int4_matmul_mosaic

        yield MOSAIC_GPU, int4_matmul_mosaic
    yield XLA, matmul_nk_int4
