"""PyTorch's attention on dense keys and values of the same shapes, for comparison. Knows nothing of JAX.

Calls run in a CUDA graph, over as many copies of the inputs as it takes to leave the cache behind.
"""

import importlib.util
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.gpu.case import Case, Clock, NotRun, Row, Table

TABLE = Table(
    "torch",
    "PyTorch's scaled_dot_product_attention, dense",
    {"time": "µs", "GB/s": "", "TFLOP/s": "", "share": "%"},
    "32 query heads, 8 KV heads of 128, bfloat16. Decode's share is of the read ceiling, prefill's of the product one.",
)
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_COLD_BYTES = 256 * 2**20
_DECODE = [(64, 4096), (1, 131_072), (8, 32_768), (1, 4096), (256, 4096)]
_PREFILL = [(1, 8192), (16, 512), (1, 32_768), (1, 512)]


def facts() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"torch": None}
    import torch

    return {"torch": torch.__version__}


def cases(clock: Clock, ceilings: dict[str, float], folder: Path) -> Iterator[Case]:
    del clock, folder
    small = not _on_gpu()
    for batch, context in [(2, 64)] if small else _DECODE:
        run = partial(_measure, batch, 1, context, ceilings)
        yield Case(TABLE, f"decode, batch {batch:>3}, context {context:>7,}", run)
    for batch, tokens in [(1, 64)] if small else _PREFILL:
        yield Case(TABLE, f"prefill, {batch} x {tokens:,} tokens", partial(_measure, batch, tokens, tokens, ceilings))


def _on_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _measure(batch: int, queries: int, context: int, ceilings: dict[str, float]) -> Row:
    if importlib.util.find_spec("torch") is None:
        raise NotRun("PyTorch is not installed")
    import torch

    moved = 4 * batch * context * _KV_HEADS * _HEAD_DIM
    copies = max(1, min(16, _COLD_BYTES // moved)) if _on_gpu() else 1
    where = {"device": "cuda" if _on_gpu() else "cpu", "dtype": torch.bfloat16}
    q = torch.randn(batch, _HEADS, queries, _HEAD_DIM, **where)
    kv = [torch.randn(2, batch, _KV_HEADS, context, _HEAD_DIM, **where) for _ in range(copies)]

    def calls() -> None:
        for k, v in kv:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    with torch.no_grad():
        seconds = (_graph_seconds(calls) if _on_gpu() else _plain_seconds(calls)) / copies
    row: Row = {"time": seconds * 1e6}
    if queries == 1:
        row["GB/s"] = moved / seconds / 1e9
        row["share"] = 100 * moved / seconds / ceilings["read"] if "read" in ceilings else None
    else:
        rate = 4 * _HEADS * _HEAD_DIM * batch * queries * (queries + 1) // 2 / seconds
        row["TFLOP/s"] = rate / 1e12
        row["share"] = 100 * rate / ceilings["product"] if "product" in ceilings else None
    return row


def _graph_seconds(calls: Any) -> float:
    """Seconds of one `calls()`, captured and replayed ten times in a row; the median of five such rows."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    taken = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / 10)
    return statistics.median(taken[1:])


def _plain_seconds(calls: Any) -> float:
    calls()
    start = time.perf_counter()
    calls()
    return time.perf_counter() - start
