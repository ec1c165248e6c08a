"""Which implementations of each kernel this device runs."""

from collections.abc import Callable, Iterator

from pallas_kernels.xla import paged_attention as xla
from pallas_kernels.xla.grouped_matmul import grouped_matmul as grouped_matmul_xla


def decode() -> Iterator[tuple[str, Callable]]:
    yield "xla", xla.paged_decode_attention


def prefill() -> Iterator[tuple[str, Callable]]:
    yield "xla", xla.paged_prefill_attention


def grouped_matmul() -> Iterator[tuple[str, Callable]]:
    yield "xla", grouped_matmul_xla
