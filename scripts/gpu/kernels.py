"""How fast every kernel is on the shapes of an 8B model: 32 query heads, 8 KV heads of 128, pages of 64, bfloat16.

Attention reads pages in random order from a pool of 4 GiB, so that nothing of it waits in the cache. Each call of a
measurement takes other pages; the queries of a call are the result of the one before.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.runner.sampler import VocabState, sample
from jaxserve.runner.step_batch import Needs, SamplingRows
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.implementations import XLA
from pallas_kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.tiles import prefill_tiles
from pallas_kernels.xla.write_pages import write_pages
from scripts.gpu import baselines, ceilings, implementations
from scripts.gpu.case import Case, Clock, NotRun, Row, Table, kernel_case
from scripts.gpu.timing import COLD_BYTES, loop_seconds, on_gpu, queued_seconds

facts = ceilings.facts

_MEMORY = {"time": "µs", "GB/s": "", "share": "%", "target": "%"}
_PRODUCTS = {"time": "µs", "TFLOP/s": "", "share": "%", "target": "TFLOP/s"}
_LAYERS = 4  # calls that share what the kernel works out from the lengths, as a model's layers do
DECODE = Table(
    "decode",
    "Paged decode attention",
    _MEMORY,
    "GB/s counts every key and value once; share is of the read ceiling. "
    f"Time is of one of {_LAYERS} layers, for all of which ours works out once how to share the lengths out.",
)
PREFILL = Table(
    "prefill",
    "Paged prefill attention",
    _PRODUCTS,
    "Only what is visible counts: 4 x heads x head size operations a query and key. Share is of the product ceiling.",
)
WRITE = Table("write", "Writing keys or values into pages", _MEMORY, "GB/s counts values read and pages written.")
GROUPED = Table(
    "grouped",
    "Grouped matrix product: Qwen3-30B-A3B's gate and up projections, 8 of 128 experts a token",
    _PRODUCTS | {"GB/s": ""},
    "GB/s counts the weights of experts that have tokens.",
)
INT4 = Table(
    "int4",
    "Product with a weight in four bits, 4,096 outputs of 12,288 inputs",
    _MEMORY,
    "GB/s counts the weight with its scales and zeros once; XLA writes it out in bfloat16 first.",
)
TUNED = Table(
    "tuned",
    "Grouped matrix product: the block sizes in use beside the quickest, by the kernel's own autotuning",
    {"in use": "", "time": "µs", "quickest": "", "its time": "µs"},
)
SAMPLING = Table("sampling", "Sampling, 151,936 entries", _MEMORY, "GB/s counts the logits once.")

# Batch and context, what matters most first: the budget may end the table.
SHAPES = [
    *((64, 4096), (1, 131_072), (8, 32_768), (1, 4096), (256, 4096), (64, 32_768), (64, 512), (256, 512), (1, 512)),
    *((8, 4096), (8, 512), (8, 131_072), (1, 32_768), (256, 32_768), (64, 131_072), (256, 131_072)),
]
COMPARED = SHAPES[:5]  # with the other implementations
TARGETS = {(64, 4096): 90.0, (1, 131_072): 80.0}
# Rows of (tokens before, new tokens).
PREFILLS = {
    "8,192 tokens": [(0, 8192)],
    "2,048 tokens behind 30,720": [(30_720, 2048)],
    "16 rows of 512": [(0, 512)] * 16,
    "32,768 tokens": [(0, 32_768)],
    "512 tokens": [(0, 512)],
}
PREFILL_TARGET = 600.0


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int

    @property
    def token_bytes(self) -> int:
        """Of one position's key and value."""
        return 4 * self.kv_heads * self.head_dim

    def for_kernel(self, tile_size: int = 0) -> AttentionShape:
        dims = (self.head_dim, self.head_dim)
        return AttentionShape(self.heads, self.kv_heads, *dims, self.page_size, "bfloat16", tile_size=tile_size)


@functools.cache
def sizes() -> Sizes:
    return Sizes(32, 8, 128, 64, 2**14) if on_gpu() else Sizes(4, 2, 64, 16, 64)


@functools.cache
def pool() -> tuple[jax.Array, jax.Array]:
    s = sizes()
    return tuple(ceilings.random_array(seed, (s.pages, s.kv_heads, s.page_size, s.head_dim)) for seed in (1, 2))  # type: ignore


def cases(clock: Clock, known: dict[str, float], folder: Path) -> Iterator[Case]:
    del clock, folder
    best = functools.cache(lambda: ceilings.rates(known))
    shapes = SHAPES if on_gpu() else [(4, 64)]
    for shape in shapes:
        for name in implementations.attention():
            if name == XLA and shape not in (shapes[0], shapes[-1]) and on_gpu():
                continue  # it is not meant for a GPU; one shape shows by how much
            run = partial(_decode, name, *shape, best)
            yield kernel_case(DECODE, name, _decode_name(shape, name), run)
        if shape in COMPARED or not on_gpu():
            for name, run in baselines.DECODE.items():
                yield Case(DECODE, _decode_name(shape, name), partial(_decode_baseline, run, *shape, best))
    for label, rows in (PREFILLS if on_gpu() else {"20 tokens behind 12": [(12, 20)]}).items():
        for name in implementations.attention():
            if name == XLA and label != "512 tokens" and on_gpu():
                continue
            for tile_size in (64, 128) if on_gpu() else (16,):
                run = partial(_prefill, name, rows, tile_size, best)
                yield kernel_case(PREFILL, name, f"{label}: {name}, tile {tile_size}", run)
        if len(set(rows)) == 1 and rows[0][0] == 0:
            run = partial(_dense_prefill, baselines.cudnn, len(rows), rows[0][1], best)
            yield Case(PREFILL, f"{label}: cuDNN, dense", run)
    for tokens in (1, 64, 256, 8192) if on_gpu() else (8,):
        yield Case(WRITE, f"{tokens:,} tokens", partial(_write, tokens, best))
    for tokens in (64, 8192) if on_gpu() else (4,):
        for name, product in (*implementations.grouped_matmul(), ("jax.lax.ragged_dot", baselines.ragged_dot)):
            run = partial(_grouped, product, tokens, best)
            yield kernel_case(GROUPED, name, f"{tokens:,} tokens: {name}", run)
    for rows in (1, 16, 64, 256) if on_gpu() else (2,):
        for name, product in implementations.int4_matmul():
            yield kernel_case(INT4, name, f"{rows} rows: {name}", partial(_int4, product, rows, best))
    for batch in (64, 256, 1) if on_gpu() else (2,):
        for name, needs in (
            ("greedy", Needs(0)),
            ("temperature", Needs.RANDOM),
            ("top-p", Needs.RANDOM | Needs.FILTER),
        ):
            yield Case(SAMPLING, f"batch {batch}: {name}", partial(_sampling, batch, needs, best))
    for tokens in (64, 8192) if on_gpu() else ():
        yield Case(TUNED, f"{tokens:,} tokens", partial(_tuned, tokens), limit=200)


def _decode_name(shape: tuple[int, int], name: str) -> str:
    return f"batch {shape[0]:>3}, context {shape[1]:>7,}: {name}"


def _memory_row(seconds: float, moved: float, best: Callable, target: float | None = None) -> Row:
    row: Row = {"time": seconds * 1e6, "GB/s": moved / seconds / 1e9, "share": 100 * moved / seconds / best()["read"]}
    return row | {"target": target}


def _product_row(seconds: float, operations: float, best: Callable, target: float | None = None) -> Row:
    rate = operations / seconds
    return {"time": seconds * 1e6, "TFLOP/s": rate / 1e12, "share": 100 * rate / best()["product"], "target": target}


def _tables(batch: int, context: int) -> jax.Array:
    """Page tables `[calls, batch, pages]` of that many calls as it takes to read `COLD_BYTES`."""
    s = sizes()
    calls = int(np.clip(COLD_BYTES // (batch * context * s.token_bytes), 1, 64)) if on_gpu() else 2
    needed = calls * batch * (context // s.page_size)
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(s.pages) for _ in range(-(-needed // s.pages))]
    return jnp.asarray(np.concatenate(shuffled)[:needed].reshape(calls, batch, -1), jnp.int32)


def _decode(implementation: str, batch: int, context: int, best: Callable) -> Row:
    s = sizes()
    implementations.check_decode(implementation, s.for_kernel())
    lengths = jnp.full(batch, context, jnp.int32)

    def step(index, q, constants):
        tables, k, v = constants
        for layer in range(_LAYERS):
            table = tables[(_LAYERS * index + layer) % len(tables)]
            settings = {"scale": s.head_dim**-0.5, "implementation": implementation}
            q = paged_decode_attention(q, k, v, table, lengths, **settings)
        return q

    q = ceilings.random_array(3, (batch, 1, s.heads, s.head_dim))
    moved = batch * context * s.token_bytes
    expected = _LAYERS * (moved / best()["read"] + 1e-5)
    seconds = loop_seconds(step, q, (_tables(batch, context), *pool()), expected=expected) / _LAYERS
    return _memory_row(seconds, moved, best, TARGETS.get((batch, context)))


def _baseline[**P](run: Callable[P, Row], *args: P.args, **kwargs: P.kwargs) -> Row:
    """Another's kernel may refuse a shape; that is no failure of ours."""
    try:
        return run(*args, **kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise NotRun(f"{type(error).__name__}: {reason[0][:150]}") from error


def _decode_baseline(make: Callable, batch: int, context: int, best: Callable) -> Row:
    s = sizes()
    moved = batch * context * s.token_bytes
    if 2 * moved > 0.4 * (ceilings.reserved_bytes() or 2**30):
        raise NotRun(f"two copies of its keys and values take {2 * moved / 2**30:.0f} GiB")

    def measure() -> Row:
        step, constants = make(s, batch, context, _tables(batch, context), pool())
        q = ceilings.random_array(3, (batch, 1, s.heads, s.head_dim))
        seconds = loop_seconds(step, q, constants, expected=moved / best()["read"] + 1e-5, most=100)
        return _memory_row(seconds, moved, best)

    return _baseline(measure)


def _prefill(implementation: str, rows: list[tuple[int, int]], tile_size: int, best: Callable) -> Row:
    s = sizes()
    implementations.check_prefill(implementation, s.for_kernel(tile_size))
    befores, counts = np.array(rows).T
    starts, ends = np.cumsum(counts) - counts, befores + counts
    tiles = prefill_tiles(starts, counts, befores, tile_size, int(sum(-(-counts // tile_size))))
    pages = np.random.default_rng(0).permutation(s.pages)
    width = -(-int(ends.max()) // s.page_size)
    table = jnp.asarray(np.resize(pages, (len(rows), width)), jnp.int32)

    def step(index, q, constants):
        table, tiles, k, v = constants
        settings = {"tile_size": tile_size, "scale": s.head_dim**-0.5, "implementation": implementation}
        return paged_prefill_attention(q, k, v, table, tiles, **settings)

    q = ceilings.random_array(3, (int(counts.sum()), s.heads, s.head_dim))
    operations = 4 * s.heads * s.head_dim * _visible(befores, counts)
    constants = (table, jnp.asarray(tiles), *pool())
    expected, most = operations / best()["product"] + 1e-5, 20 if implementation == XLA else 1000
    seconds = _prefill_seconds(step, q, constants, expected, most)
    return _product_row(seconds, operations, best, PREFILL_TARGET if rows == [(0, 8192)] else None)


def _prefill_seconds(step: Callable, q: jax.Array, constants: tuple, expected: float, most: int) -> float:
    """Long calls one by one: a loop would copy each one's whole output to where the next expects it."""
    if expected < 5e-4:
        return loop_seconds(step, q, constants, expected=expected, most=most)
    call = jax.jit(partial(step, 0))
    return queued_seconds(lambda: call(q, constants))


def _visible(befores: np.ndarray, counts: np.ndarray) -> int:
    """Pairs of a query and a key that it sees."""
    return int(sum(count * before + count * (count + 1) // 2 for before, count in zip(befores, counts, strict=True)))


def _dense_prefill(attend: Callable, batch: int, tokens: int, best: Callable) -> Row:
    s = sizes()
    operations = 4 * s.heads * s.head_dim * batch * tokens * (tokens + 1) // 2

    def measure() -> Row:
        k, v = (ceilings.random_array(seed, (batch, tokens, s.kv_heads, s.head_dim)) for seed in (1, 2))
        q = ceilings.random_array(3, (batch, tokens, s.heads, s.head_dim))
        expected = operations / best()["product"] + 1e-5
        seconds = _prefill_seconds(lambda index, q, kv: attend(q, *kv, causal=True), q, (k, v), expected, 1000)
        return _product_row(seconds, operations, best)

    return _baseline(measure)


def _write(tokens: int, best: Callable) -> Row:
    s = sizes()
    rng = np.random.default_rng(0)
    calls = 16
    places = rng.choice(s.pages * s.page_size, (calls, tokens), replace=False).astype(np.int32)
    values = ceilings.random_array(3, (tokens, s.kv_heads, s.head_dim))

    def step(index, pages, constants):
        values, places = constants
        place = places[index % calls]
        return write_pages(pages, values, place // s.page_size, place % s.page_size)

    pages = ceilings.random_array(4, pool()[0].shape)
    moved = 2 * values.nbytes
    seconds = loop_seconds(step, pages, (values, jnp.asarray(places)), expected=moved / best()["read"] + 5e-6)
    return _memory_row(seconds, moved, best)


def _grouped(product: Callable, tokens: int, best: Callable) -> Row:
    groups, chosen, inputs, outputs = (128, 8, 2048, 1536) if on_gpu() else (4, 2, 32, 48)
    rows = tokens * chosen
    rng = np.random.default_rng(0)
    counts = np.bincount(rng.integers(groups, size=rows), minlength=groups)
    weights = ceilings.random_array(1, (groups, outputs, inputs), inputs**-0.5)
    x = ceilings.random_array(3, (rows, inputs))

    def step(index, x, constants):
        weights, sizes = constants
        out = product(x, weights, sizes)
        return jnp.concatenate([out, out], axis=1)[:, :inputs]  # the next input

    measure = partial(_grouped_seconds, step, x, weights, counts, best)
    seconds = _baseline(measure) if product is baselines.ragged_dot else measure()
    row = _product_row(seconds, 2 * rows * inputs * outputs, best)
    return row | {"GB/s": float((counts > 0).sum() * 2 * outputs * inputs / seconds / 1e9)}


def _grouped_seconds(step: Callable, x: jax.Array, weights: jax.Array, counts: np.ndarray, best: Callable) -> float:
    expected = max(
        2 * x.shape[0] * weights.shape[1] * weights.shape[2] / best()["product"], weights.nbytes / best()["read"]
    )
    return loop_seconds(step, x, (weights, jnp.asarray(counts, jnp.int32)), expected=expected)


def _int4(product: Callable, rows: int, best: Callable) -> Row:
    """Of weights one after the other, so many that none waits in the cache."""
    outputs, inputs, copies = (4096, 12_288, 11) if on_gpu() else (64, 256, 2)
    groups = outputs, inputs // 128
    scale, zero = jnp.full(groups, (3 / inputs) ** 0.5 / 8), jnp.zeros(groups, jnp.int8)
    weights = [jax.random.bits(jax.random.key(seed), (outputs, inputs // 2), jnp.uint8) for seed in range(copies)]

    def step(index, x, constants):
        weights, scales, zeros = constants
        for weight, scale, zero in zip(weights, scales, zeros, strict=True):
            out = product(x, weight, scale, zero).astype(x.dtype)
            x = jnp.tile(out, (1, -(-inputs // outputs)))[:, :inputs]  # the next input
        return x

    constants = weights, [scale + 0 for _ in weights], [zero + 0 for _ in weights]
    moved = weights[0].nbytes + scale.nbytes + zero.nbytes
    expected = copies * moved / best()["read"]
    x = ceilings.random_array(3, (rows, inputs))
    return _memory_row(loop_seconds(step, x, constants, expected=expected) / copies, moved, best)


def _tuned(tokens: int) -> Row:
    from pallas_kernels.mosaic_gpu.block_sizes import GROUPED_MATMUL_CANDIDATES, grouped_matmul_blocks
    from pallas_kernels.mosaic_gpu.grouped_matmul import autotune

    rows, groups = 8 * tokens, 128
    used = grouped_matmul_blocks(rows, groups)
    near = [
        blocks
        for blocks in GROUPED_MATMUL_CANDIDATES
        if used.tokens // 2 <= blocks.tokens <= 2 * used.tokens and blocks.out == used.out
    ]
    quickest, seconds = autotune(rows, groups, 1536, 2048, candidates=near)
    mine = seconds.get(used)
    return {
        "in use": "/".join(map(str, used)),
        "time": None if mine is None else mine * 1e6,
        "quickest": "/".join(map(str, quickest)),
        "its time": seconds[quickest] * 1e6,
    }


def _sampling(batch: int, needs: Needs, best: Callable) -> Row:
    vocab_size = 151_936 if on_gpu() else 1000
    rows = SamplingRows.empty(batch)._replace(
        temperature=np.full(batch, 0.8, np.float32), top_p=np.full(batch, 0.9, np.float32)
    )
    masked, vocab = np.zeros(batch, bool), VocabState.empty(1, vocab_size)
    slots = np.zeros(batch, np.int32)

    def step(index, logits, constants):
        tokens = sample(logits, jnp.full(batch, index, jnp.int32), slots, *constants, np.int32(needs))
        return logits.at[:, 0].set(tokens * 1e-9)  # so that no round is like the one before

    logits = ceilings.random_array(3, (batch, vocab_size), 3.0, jnp.float32)
    moved = logits.nbytes
    seconds = loop_seconds(step, logits, (rows, masked, vocab), expected=moved / best()["read"] + 2e-5)
    return _memory_row(seconds, moved, best)
