"""Every kernel against numpy: attention in float64, writes and choices exactly, draws by their frequencies.

Inputs are random and exact in their own dtype; pages that nobody owns hold NaN, so that a read of them shows. Each
kernel runs three times: results that differ between runs are a race.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.runner.sampler import VocabState, sample
from jaxserve.runner.step_batch import Needs, SamplingRows
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.implementations import MOSAIC_GPU
from pallas_kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.tiles import prefill_tiles
from pallas_kernels.xla.write_pages import write_pages
from scripts.gpu import ceilings, implementations
from scripts.gpu.case import Case, Clock, Row, Table, kernel_case
from scripts.gpu.timing import on_gpu
from tests.pallas_kernels.reference import Pool, reference

facts = ceilings.facts

_COLUMNS = {"error": "", "allowed": "", "worst": "", "same thrice": "", "ok": ""}
_NOTE = "error is |found - expected| / |expected| over all outputs, worst the largest single difference."
DECODE = Table("correct decode", "Correctness: paged decode attention", _COLUMNS, _NOTE)
PREFILL = Table("correct prefill", "Correctness: paged prefill attention", _COLUMNS, _NOTE)
GROUPED = Table("correct grouped", "Correctness: grouped matrix product", _COLUMNS, _NOTE)
INT4 = Table("correct int4", "Correctness: product with a weight in four bits", _COLUMNS, _NOTE)
OTHER = Table(
    "correct other", "Correctness: page writes and sampling", _COLUMNS, "error is the share of wrong entries."
)

# What rounding weights and outputs to the dtype may cost; a wrong page or mask costs a hundred times more.
ALLOWED = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attention's heads and pages, and what else it takes."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    queries: int = 1

    def __str__(self) -> str:
        extras = [f"{name} {getattr(self, name)}" for name in ("window", "soft_cap") if getattr(self, name)]
        extras += ["sinks"] * self.sinks + [f"{self.queries} queries"] * (self.queries > 1)
        heads = f"{self.kv_heads * self.group}/{self.kv_heads} x {self.head_dim}, page {self.page_size}"
        return ", ".join([heads, *extras] + [self.dtype] * (self.dtype != "bfloat16"))

    def for_kernel(self, tile_size: int = 0) -> AttentionShape:
        heads, dims = self.kv_heads * self.group, (self.head_dim, self.head_dim)
        return AttentionShape(heads, self.kv_heads, *dims, self.page_size, self.dtype, self.queries, tile_size)

    def variant(self, rng: np.random.Generator) -> dict:
        sinks = rng.normal(size=self.kv_heads * self.group).astype(np.float32) if self.sinks else None
        return {"scale": self.head_dim**-0.5, "window": self.window, "soft_cap": self.soft_cap, "sinks": sinks}


_VARIANTS = (
    Shape(),  # Qwen3-8B, Llama 3.1 8B
    Shape(page_size=16),
    Shape(kv_heads=2, group=8, head_dim=64, page_size=32),
    Shape(kv_heads=4, group=1),
    Shape(kv_heads=1, group=5, page_size=128),
    Shape(kv_heads=2, group=2, head_dim=256),
    Shape(window=100),
    Shape(soft_cap=20.0),
    Shape(kv_heads=8, group=8, head_dim=64, window=128, sinks=True),  # gpt-oss
    Shape(dtype="float16"),
)
_TINY = (Shape(2, 2, 64, 16), Shape(1, 2, 64, 16, window=20, soft_cap=20.0, sinks=True))


def cases(clock: Clock, known: dict[str, float], folder: Path) -> Iterator[Case]:
    del clock, known, folder
    kinds = [list(kind()) for kind in (_decode_cases, _prefill_cases, _grouped_cases, _int4_cases, _other_cases)]
    for first, *_ in kinds:  # one of each before the budget may end
        yield first
    for _, *rest in kinds:
        yield from rest


def _grouped_cases() -> Iterator[Case]:
    shapes = ((300, 8, 384, 256), (512, 128, 768, 1024)) if on_gpu() else ((40, 4, 24, 16),)
    for tokens, groups, outputs, inputs in shapes:
        for name, product in implementations.grouped_matmul():
            run = partial(_grouped, product, tokens, groups, outputs, inputs)
            yield kernel_case(GROUPED, name, f"{name}: {tokens} rows, {groups} x {outputs} x {inputs}", run)


def _int4_cases() -> Iterator[Case]:
    shapes = ((1, 4096, 4096), (16, 640, 1280), (70, 6144, 4096), (256, 192, 512)) if on_gpu() else ((3, 64, 256),)
    for rows, outputs, inputs in shapes:
        for name, product in implementations.int4_matmul():
            run = partial(_int4, product, rows, outputs, inputs)
            yield kernel_case(INT4, name, f"{name}: {rows} rows, {outputs} x {inputs}", run)


def _other_cases() -> Iterator[Case]:
    yield Case(OTHER, "KV write", _write)
    yield Case(OTHER, "sampling: greedy", _greedy)
    for settings in ({}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}):
        name = ", ".join(f"{key} {value}" for key, value in settings.items()) or "temperature 1"
        yield Case(OTHER, f"sampling: {name}", partial(_draws, **settings))


def _decode_cases() -> Iterator[Case]:
    lengths = [1, 63, 64, 65, 128, 1000, 4097, 0] if on_gpu() else [1, 17, 0]
    shapes = [*_VARIANTS, Shape(queries=4), Shape(kv_heads=2, group=8, queries=3, window=64)] if on_gpu() else _TINY
    for name in implementations.attention():
        for shape in shapes if name == MOSAIC_GPU else shapes[:2]:
            yield kernel_case(DECODE, name, f"{name}: {shape}", partial(_decode, name, shape, lengths))
        if name == MOSAIC_GPU:
            rng = np.random.default_rng(1)
            busy, long = Shape(2, 4), Shape(1, 4)
            lengths_of_64 = rng.integers(1, 3000, 64).tolist()
            yield kernel_case(
                DECODE, name, f"{name}: 64 rows of 1 to 3,000", partial(_decode, name, busy, lengths_of_64)
            )
            yield kernel_case(
                DECODE, name, f"{name}: rows of 131,072 and 5", partial(_decode, name, long, [131_072, 5])
            )


def _prefill_cases() -> Iterator[Case]:
    rows = [(0, 200), (130, 7), (64, 64), (1000, 129), (0, 1)] if on_gpu() else [(0, 20), (17, 3)]
    for name in implementations.attention():
        for tile_size in (64, 128) if name == MOSAIC_GPU else (64,) if on_gpu() else (16,):
            for shape in _TINY if not on_gpu() else _VARIANTS if name == MOSAIC_GPU else _VARIANTS[:2]:
                run = partial(_prefill, name, shape, rows, tile_size)
                yield kernel_case(PREFILL, name, f"{name}: {shape}, tile {tile_size}", run)
        if name == MOSAIC_GPU:
            run = partial(_prefill, name, Shape(2, 4), [(0, 8192)], 128, checked=64)
            yield kernel_case(PREFILL, name, f"{name}: one prompt of 8,192", run)


def compare(run: Callable[[], jax.Array], expected: np.ndarray, dtype: str, taken: object = ...) -> Row:
    """Three runs of a kernel, `taken` of their results, against `expected` in float64."""
    found = [np.asarray(run(), np.float64) for _ in range(3)]
    difference = np.abs(found[0][taken] - expected)
    error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    same = all(np.array_equal(found[0], other) for other in found[1:])
    return {
        "error": error,
        "allowed": ALLOWED[dtype],
        "worst": float(difference.max()),
        "same thrice": same,
        "ok": bool(error <= ALLOWED[dtype]) and same,  # a NaN is no small error
    }


def _decode(implementation: str, shape: Shape, lengths: list[int]) -> Row:
    implementations.check_decode(implementation, shape.for_kernel())
    rng = np.random.default_rng(0)
    lengths = [max(length, shape.queries) if length else 0 for length in lengths]
    pool = Pool(rng, lengths, shape.kv_heads, shape.page_size, shape.head_dim, shape.dtype)
    heads = shape.kv_heads * shape.group
    q = jnp.asarray(rng.normal(size=(len(lengths), shape.queries, heads, shape.head_dim)), shape.dtype)
    variant = shape.variant(rng)
    q64 = np.asarray(q, np.float64)
    expected = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        for query in range(shape.queries):
            seen = max(0, length - shape.queries + query + 1)
            expected[row, query] = reference(q64[row, query], pool.keys[row][:seen], pool.values[row][:seen], **variant)
    settings = {"scale": variant["scale"], "window": shape.window, "soft_cap": shape.soft_cap}
    run = jax.jit(partial(paged_decode_attention, implementation=implementation, **settings))
    table, lengths_b = jnp.asarray(pool.table), jnp.asarray(lengths, jnp.int32)
    return compare(lambda: run(q, pool.k, pool.v, table, lengths_b, sinks=variant["sinks"]), expected, shape.dtype)


def _prefill(
    implementation: str, shape: Shape, rows: list[tuple[int, int]], tile_size: int, checked: int | None = None
) -> Row:
    """`checked` random tokens are compared, or all."""
    implementations.check_prefill(implementation, shape.for_kernel(tile_size))
    rng = np.random.default_rng(0)
    pool = Pool(rng, [sum(row) for row in rows], shape.kv_heads, shape.page_size, shape.head_dim, shape.dtype)
    befores, counts = np.array(rows).T
    starts = np.cumsum(counts) - counts
    tokens = int(counts.sum()) + 3  # padding at the end, in no tile
    tiles = prefill_tiles(starts, counts, befores, tile_size, tokens // tile_size + len(rows) + 1)
    q = jnp.asarray(rng.normal(size=(tokens, shape.kv_heads * shape.group, shape.head_dim)), shape.dtype)
    variant = shape.variant(rng)
    owners = np.repeat(np.arange(len(rows)), counts)
    taken = np.arange(tokens) if checked is None else np.sort(rng.choice(len(owners), checked, replace=False))
    expected = np.zeros((len(taken), *q.shape[1:]))
    q64 = np.asarray(q, np.float64)
    for index, token in enumerate(taken):
        if token < len(owners):
            row = owners[token]
            seen = befores[row] + token - starts[row] + 1
            expected[index] = reference(q64[token], pool.keys[row][:seen], pool.values[row][:seen], **variant)
    settings = {"scale": variant["scale"], "window": shape.window, "soft_cap": shape.soft_cap, "tile_size": tile_size}
    run = jax.jit(partial(paged_prefill_attention, implementation=implementation, **settings))
    inputs = q, pool.k, pool.v, jnp.asarray(pool.table), jnp.asarray(tiles)
    return compare(lambda: run(*inputs, sinks=variant["sinks"]), expected, shape.dtype, taken)


def _grouped(product: Callable, tokens: int, groups: int, outputs: int, inputs: int) -> Row:
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(
        tokens - 5, rng.dirichlet(np.full(groups, 0.3))
    )  # five rows are in no group, and many empty
    x = jnp.asarray(rng.normal(size=(tokens, inputs)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(groups, outputs, inputs)) * inputs**-0.5, jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    expected, start = np.zeros((tokens, outputs)), 0
    for group, size in enumerate(sizes):
        if size:  # a group without rows costs nothing
            expected[start : start + size] = x64[start : start + size] @ np.asarray(weights[group], np.float64).T
        start += size
    run, sizes_g = jax.jit(product), jnp.asarray(sizes, jnp.int32)
    return compare(lambda: run(x, weights, sizes_g), expected, "bfloat16")


def _int4(product: Callable, rows: int, outputs: int, inputs: int) -> Row:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.bfloat16)
    numbers = rng.integers(-8, 8, (outputs, inputs))
    halves = (numbers & 15).astype(np.uint8)
    groups = outputs, inputs // 128
    scale, zero = rng.uniform(0.01, 0.1, groups).astype(np.float32), rng.integers(-8, 9, groups).astype(np.int8)
    weight = ((numbers.reshape(*groups, -1) - zero[..., None]) * scale[..., None].astype(np.float64)).reshape(
        outputs, -1
    )
    run, stored = jax.jit(product), jnp.asarray(halves[:, ::2] | halves[:, 1::2] << 4)
    return compare(lambda: run(x, stored, scale, zero), np.asarray(x, np.float64) @ weight.T, "bfloat16")


def _exactly(wrong: float) -> Row:
    return {"error": wrong, "allowed": 0.0, "worst": None, "same thrice": None, "ok": wrong == 0}


def _write() -> Row:
    """Tokens go to scattered places; one of them outside the pool."""
    rng = np.random.default_rng(0)
    pages = np.asarray(jnp.asarray(rng.normal(size=(40, 8, 64, 128)), jnp.bfloat16))
    tokens = 500
    places = rng.choice(40 * 64, tokens, replace=False)
    ids, offsets = (places // 64).astype(np.int32), (places % 64).astype(np.int32)
    ids[7] = 40
    values = np.asarray(jnp.asarray(rng.normal(size=(tokens, 8, 128)), jnp.bfloat16))
    found = jax.jit(write_pages, donate_argnums=0)(jnp.asarray(pages), values, ids, offsets)
    expected = pages.copy()
    for token in range(tokens):
        if token != 7:
            expected[ids[token], :, offsets[token]] = values[token]
    return _exactly(float(np.mean(np.asarray(found) != expected)))


def _sample(logits: np.ndarray, needs: Needs, seeds: np.ndarray | None = None, **settings: float) -> np.ndarray:
    count = len(logits)
    rows = SamplingRows.empty(count)
    for name, value in settings.items():
        getattr(rows, name)[:] = value
    if seeds is not None:
        rows = rows._replace(seed=seeds)
    zeros, masked, vocab = np.zeros(count, np.int32), np.zeros(count, bool), VocabState.empty(1, logits.shape[1])
    return np.asarray(jax.jit(sample)(logits, zeros, zeros, rows, masked, vocab, np.int32(needs)))


def _greedy() -> Row:
    logits = np.random.default_rng(0).normal(size=(64, 151_936 if on_gpu() else 1000)).astype(np.float32)
    return _exactly(float(np.mean(_sample(logits, Needs(0)) != logits.argmax(axis=1))))


def _draws(**settings: float) -> Row:
    """Drawn tokens of many seeds: none that the settings leave out, and each as often as its probability says."""
    rng = np.random.default_rng(0)
    logits, count = (2 * rng.normal(size=100)).astype(np.float32), 20_000 if on_gpu() else 2000
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = np.ones(100, bool)
    kept[order[int(settings.get("top_k", 100)) :]] = False
    kept[order[1:][np.cumsum(p[order])[:-1] >= settings.get("top_p", 2)]] = False
    kept &= p >= settings.get("min_p", 0) * p.max()
    p = np.where(kept, p, 0) / p[kept].sum()
    needs = Needs.RANDOM | (Needs.FILTER if settings else Needs(0))
    seeds = np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.uint32)
    drawn = _sample(np.tile(logits, (count, 1)), needs, seeds, temperature=1, **settings)
    share = np.bincount(drawn, minlength=100) / count
    off = np.abs(share - p) > 5 * np.sqrt(p * (1 - p) / count) + 3 / count  # five standard deviations, and rare tokens
    return _exactly(float(off.mean()))
