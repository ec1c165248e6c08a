"""From logits to tokens, on the device.

Each part that no row of a step needs is skipped at run time, so that one program serves greedy and sampled requests
alike and a greedy step costs one argmax.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.runner.step_batch import LogprobRows, Needs, SamplingRows, mask_words

_BANNED = -jnp.inf


class VocabState(NamedTuple):
    """What each slot keeps per vocabulary entry; of use to rows with penalties, a bias or a mask only."""

    prompt_tokens: jax.Array  # bool [slots, vocab]
    output_counts: jax.Array  # int32 [slots, vocab]
    bias: jax.Array  # float32 [slots, vocab]
    allowed: jax.Array  # uint32 [slots, vocab / 32], rounded up: a bit for each token that may come next

    @classmethod
    def empty(cls, slots: int, vocab_size: int) -> "VocabState":
        shape = slots, vocab_size
        masks = jnp.zeros((slots, mask_words(vocab_size)), jnp.uint32)
        return cls(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), masks)


def sample(
    logits: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    rows: SamplingRows,
    masked: jax.Array,
    vocab: VocabState,
    needs: jax.Array,
) -> jax.Array:
    """The next token of each row: int32 `[rows]`.

    `logits` float32 `[rows, vocab]`, `lengths` int32 `[rows]` (tokens so far, which is the new token's position),
    `slots` int32 `[rows]`, `rows` the settings of each row, `masked` bool `[rows]` (only tokens that its slot allows),
    `needs` a `Needs` value.
    """
    logits = jax.lax.cond(
        needs & Needs.ADJUST != 0, _adjust, lambda logits, *_: logits, logits, lengths, slots, rows, vocab
    )
    logits = jax.lax.cond(needs & Needs.MASK != 0, _mask, lambda logits, *_: logits, logits, slots, masked, vocab)
    greedy = _first_largest(logits)

    def draw() -> jax.Array:
        scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        probabilities = jax.nn.softmax(scaled, axis=-1)
        kept = jax.lax.cond(needs & Needs.FILTER != 0, _filter, lambda p, _: p, probabilities, rows)
        return jnp.where(rows.temperature > 0, _draw(kept, rows.seed, lengths), greedy)

    return jax.lax.cond(needs & Needs.RANDOM != 0, draw, lambda: greedy)


def _first_largest(logits: jax.Array) -> jax.Array:
    """`argmax` over the last axis, int32, in two passes that XLA vectorises on the CPU: eight times as fast there."""
    vocab_size = logits.shape[-1]
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    first = jnp.where(is_largest, jnp.arange(vocab_size, dtype=jnp.int32), vocab_size).min(axis=-1)
    return jnp.minimum(first, vocab_size - 1)  # where all are NaN none is the largest


def _adjust(
    logits: jax.Array, lengths: jax.Array, slots: jax.Array, rows: SamplingRows, vocab: VocabState
) -> jax.Array:
    """Penalties, biases, and no stop token before its time."""
    counts = vocab.output_counts[slots]
    penalty = jnp.where((counts > 0) | vocab.prompt_tokens[slots], rows.repetition_penalty[:, None], 1.0)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    penalised -= rows.presence_penalty[:, None] * (counts > 0) + rows.frequency_penalty[:, None] * counts
    # A slot's row is whatever its last such request left: rows without a penalty have neutral factors, a bias has none.
    penalised += jnp.where(rows.has_bias[:, None], vocab.bias[slots], 0.0)
    too_short = (lengths < rows.min_length)[:, None]
    banned = jnp.where(too_short & (rows.stop_token_ids >= 0), rows.stop_token_ids, logits.shape[-1])
    return penalised.at[jnp.arange(len(slots))[:, None], banned].set(_BANNED, mode="drop")


def _mask(logits: jax.Array, slots: jax.Array, masked: jax.Array, vocab: VocabState) -> jax.Array:
    """Nothing but what a masked row's slot allows."""
    words = vocab.allowed[slots]
    bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(len(slots), -1)[:, : logits.shape[-1]] != 0
    return jnp.where(allowed | ~masked[:, None], logits, _BANNED)


def _filter(probabilities: jax.Array, rows: SamplingRows) -> jax.Array:
    """Zero what top-k, then top-p (Holtzman et al., 2019, arXiv:1904.09751), then min-p leave out.

    No sort: the bits of a non-negative float order as the float does, so the smallest kept probability is found from
    the highest bit down, a few bits a pass. Equal probabilities at the edge are all kept.
    """
    largest = probabilities.max(axis=-1)
    k = jnp.where(rows.top_k > 0, rows.top_k, probabilities.shape[-1]).astype(jnp.float32)
    ones = jnp.ones_like(probabilities)
    kept = jnp.where(probabilities >= _threshold(probabilities, ones, k)[:, None], probabilities, 0.0)
    by_mass = _threshold(kept, kept, rows.top_p * kept.sum(axis=-1))
    by_mass = jnp.where(rows.top_p < 1, by_mass, 0.0)  # rounding must not cost a top_p of 1 its tail
    return jnp.where(kept >= jnp.maximum(by_mass, rows.min_p * largest)[:, None], kept, 0.0)


def _threshold(values: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest float `t` of each row such that the weights of its `values`, 0 to 1, `>= t` are `wanted` or more."""
    vocab = values.shape[-1]
    # A GPU has arithmetic to spare in each pass over a vocabulary and wants few of them, a CPU has none.
    several = partial(_search, bits_per_pass=3, parts=vocab // math.gcd(vocab, 128))
    return jax.lax.platform_dependent(
        values, weights, wanted, cpu=partial(_search, bits_per_pass=1, parts=1), default=several
    )


def _search(values: jax.Array, weights: jax.Array, wanted: jax.Array, *, bits_per_pass: int, parts: int) -> jax.Array:
    """`_threshold` by comparing with `2 ** bits_per_pass - 1` candidates at once; each row is summed in `parts` first.

    The parts, all of one reduction, keep XLA from a second kernel for each candidate.
    """
    values_rpv, weights_rpv = (array.reshape(len(values), parts, -1) for array in (values, weights))
    bits = jax.lax.bitcast_convert_type(values_rpv, jnp.int32)

    def add_bits(step: jax.Array, low: jax.Array) -> jax.Array:
        shift = 30 - bits_per_pass * (step + 1)
        candidates = [low + (digit << shift) for digit in range(1, 1 << bits_per_pass)]
        sums = [jnp.where(bits >= candidate[:, None, None], weights_rpv, 0.0).sum(-1) for candidate in candidates]
        enough = jnp.stack(sums, axis=-1).sum(axis=1) >= wanted[:, None]
        return low + (enough.sum(axis=-1, dtype=jnp.int32) << shift)

    # Without a loop a GPU's whole step is one CUDA graph; to a CPU that is only more to compile.
    unroll = bits_per_pass > 1
    found = jax.lax.fori_loop(0, 30 // bits_per_pass, add_bits, jnp.zeros(len(values), jnp.int32), unroll=unroll)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _draw(weights: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One token of each row, with odds as `weights` `[rows, vocab]`, by inverting the cumulative sum.

    The random number is a function of the row's seed and the token's position alone, so that a request repeats
    whatever ran beside it and however it was cut into steps.
    """

    def uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position))

    cumulative = jnp.cumsum(weights, axis=-1)
    target = jax.vmap(uniform)(seeds, positions)[:, None] * cumulative[:, -1:]
    # Where rounding leaves the target at the very end, the last token of any weight is the one.
    drawn = jnp.sum(cumulative <= target, axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.minimum(drawn, last).astype(jnp.int32)


def log_probabilities(logits: jax.Array, token_ids: jax.Array, count: int) -> LogprobRows:
    """Log-probabilities of `token_ids` `[rows]` and of the `count` likeliest tokens under `logits` `[rows, vocab]`."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    top, top_ids = jax.lax.top_k(logits, count)
    rank = 1 + jnp.sum(logits > chosen, axis=-1)
    return LogprobRows(
        chosen[:, 0] - normaliser, rank.astype(jnp.int32), top_ids.astype(jnp.int32), top - normaliser[:, None]
    )
