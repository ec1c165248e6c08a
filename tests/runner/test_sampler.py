"""Sampling on the device against plain numpy, and against what the settings promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.runner.sampler import VocabState, _search, log_probabilities, sample
from jaxserve.runner.step_batch import Needs, SamplingRows

VOCAB = 53
ALL = int(Needs.RANDOM | Needs.FILTER | Needs.ADJUST)
_compiled = jax.jit(sample)


def compiled(logits, lengths, slots, settings, state, needs, masked=False) -> jax.Array:
    return _compiled(logits, lengths, slots, settings, np.full(len(logits), masked), state, needs)


def rows(count: int, **columns) -> SamplingRows:
    settings = SamplingRows.empty(count)
    for name, value in columns.items():
        getattr(settings, name)[:] = value
    return settings


def vocab(count: int, **columns) -> VocabState:
    return VocabState.empty(count, VOCAB)._replace(**columns)


def draw_many(logits: np.ndarray, draws: int, **columns) -> np.ndarray:
    """Draws from one distribution, each with a seed of its own."""
    seeds = np.stack([np.arange(draws), np.zeros(draws)], axis=1).astype(np.uint32)
    settings = rows(draws, temperature=1.0) if "temperature" not in columns else rows(draws)
    for name, value in ({"seed": seeds} | columns).items():
        getattr(settings, name)[:] = value
    tiled = np.tile(logits.astype(np.float32), (draws, 1))
    return np.asarray(compiled(tiled, np.full(draws, 7), np.zeros(draws, np.int32), settings, vocab(1), ALL))


def kept_tokens(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """What top-k, then top-p, then min-p leave, by sorting."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp(logits - logits.max())
    p /= p.sum()
    kept = list(order[:top_k] if top_k else order)
    mass = p[kept] / p[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(mass), top_p - 1e-7)) + 1] if top_p < 1 else kept
    return {int(token) for token in kept if p[token] >= min_p * p.max()}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 1, 3, 10]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_only_tokens_that_the_filters_keep_are_drawn_and_each_of_them_is(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=VOCAB)
    drawn = draw_many(logits, 2048, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = kept_tokens(logits, top_k, top_p, min_p)
    assert set(drawn.tolist()) <= kept
    p = np.exp(logits) / sum(np.exp(logits[list(kept)]))
    likely = {token for token in kept if p[token] > 0.01}  # missed in 2,048 draws once in a billion
    assert likely <= set(drawn.tolist())


@pytest.mark.parametrize(("bits_per_pass", "parts"), [(1, 1), (3, 8)], ids=["as-on-a-cpu", "as-on-a-gpu"])
def test_the_search_ends_at_the_wanted_value_bit_for_bit(bits_per_pass, parts):
    values = np.random.default_rng(0).random((6, 64), np.float32) ** 30  # down to 1e-40 or so, and two extremes
    values[:, :2] = 0, 1
    largest_first = -np.sort(-values)
    wanted = np.array([1, 2, 10, 32, 63, 64])
    ones, wanted_floats = jnp.ones_like(values), jnp.asarray(wanted, jnp.float32)
    found = _search(jnp.asarray(values), ones, wanted_floats, bits_per_pass=bits_per_pass, parts=parts)
    np.testing.assert_array_equal(found, largest_first[np.arange(6), wanted - 1])
    half = (jnp.asarray(values.sum(axis=1)) * 0.5).astype(jnp.float32)
    found = _search(jnp.asarray(values), jnp.asarray(values), half, bits_per_pass=bits_per_pass, parts=parts)
    mass = np.cumsum(largest_first.astype(np.float64), axis=1)
    np.testing.assert_array_equal(found, largest_first[np.arange(6), (mass < np.asarray(half)[:, None]).sum(axis=1)])


def test_drawn_frequencies_follow_the_distribution():
    logits = np.random.default_rng(3).normal(size=VOCAB) * 1.5
    temperature = 0.7
    counts = np.bincount(draw_many(logits, 65536, temperature=temperature), minlength=VOCAB)
    p = np.exp(logits / temperature)
    expected = p / p.sum() * 65536
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 110  # 52 degrees of freedom: exceeded by a right sampler once in 200,000


def test_a_seed_and_position_repeat_their_token_whatever_row_they_run_in():
    logits = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32)
    alone = compiled(logits, np.array([9]), np.array([0]), rows(1, temperature=1.0, seed=[5, 6]), vocab(1), ALL)
    others = np.random.default_rng(2).normal(size=(4, VOCAB)).astype(np.float32)
    others[3] = logits[0]
    settings = rows(4, temperature=1.0)
    settings.seed[:] = [[1, 1], [2, 2], [3, 3], [5, 6]]
    together = compiled(others, np.array([1, 2, 3, 9]), np.arange(4), settings, vocab(4), ALL)
    assert together[3] == alone[0]


def test_temperature_zero_takes_the_likeliest_token_beside_rows_that_sample():
    logits = np.random.default_rng(4).normal(size=(2, VOCAB)).astype(np.float32)
    settings = rows(2)
    settings.temperature[1] = 2.0
    assert compiled(logits, np.zeros(2, int), np.arange(2), settings, vocab(2), ALL)[0] == logits[0].argmax()


def test_penalties_and_bias_move_logits_as_defined():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32)
    prompt = rng.random((1, VOCAB)) < 0.3
    counts = rng.integers(0, 3, (1, VOCAB)).astype(np.int32)
    bias = rng.normal(size=(1, VOCAB)).astype(np.float32)
    for columns in (
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.1},
        {"frequency_penalty": -0.9},
        {"has_bias": True},
    ):
        expected = logits[0].copy()
        seen = prompt[0] | (counts[0] > 0)
        factor = np.where(seen, columns.get("repetition_penalty", 1.0), 1.0)
        expected = np.where(expected > 0, expected / factor, expected * factor)
        expected -= (
            columns.get("presence_penalty", 0.0) * (counts[0] > 0) + columns.get("frequency_penalty", 0.0) * counts[0]
        )
        expected += bias[0] * columns.get("has_bias", False)
        token = compiled(
            logits,
            np.array([0]),
            np.array([0]),
            rows(1, **columns),
            vocab(1, prompt_tokens=prompt, output_counts=counts, bias=bias),
            ALL,
        )
        assert token[0] == expected.argmax()


def test_a_neighbours_bias_left_in_the_slot_does_not_act():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 4] = 1.0
    bias = np.zeros((1, VOCAB), np.float32)
    bias[0, 9] = 50.0
    assert compiled(logits, np.array([0]), np.array([0]), rows(1), vocab(1, bias=bias), ALL)[0] == 4


@pytest.mark.parametrize(("length", "expected"), [(9, 2), (10, 1)])
def test_stop_tokens_are_banned_until_the_minimum_length(length, expected):
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 1], logits[0, 2] = 3.0, 2.0
    settings = rows(1, min_length=10)
    settings.stop_token_ids[0, 0] = 1
    assert compiled(logits, np.array([length]), np.array([0]), settings, vocab(1), ALL)[0] == expected


def test_a_masked_row_takes_what_its_slot_allows_and_others_take_what_they_like():
    logits = np.random.default_rng(7).normal(size=(3, VOCAB)).astype(np.float32)
    order = np.argsort(-logits, axis=-1)
    allowed = np.zeros((3, 2), np.uint32)
    for slot, token in ((2, order[0, 5]), (2, order[0, 9]), (1, order[2, 0])):
        allowed[slot, token // 32] |= np.uint32(1 << token % 32)
    masked, needs = np.array([True, False, True]), int(Needs.MASK)
    state, slots = vocab(3, allowed=allowed), np.array([2, 0, 1])
    assert compiled(logits, np.zeros(3, int), slots, rows(3), state, needs, masked).tolist() == [
        order[0, 5],
        order[1, 0],
        order[2, 0],
    ]
    drawn = compiled(logits, np.zeros(3, int), slots, rows(3, temperature=100.0), state, needs | ALL, masked)
    assert drawn[0] in order[0, [5, 9]]
    assert drawn[2] == order[2, 0]


def test_log_probabilities_equal_a_float64_log_softmax():
    logits = np.random.default_rng(6).normal(size=(3, VOCAB)).astype(np.float32) * 5
    tokens = np.array([0, 10, 52])
    found = log_probabilities(jnp.asarray(logits), jnp.asarray(tokens), 4)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(found.logprob, exact[np.arange(3), tokens], atol=1e-5)
    order = np.argsort(-exact, axis=-1)
    np.testing.assert_array_equal(found.top_token_ids, order[:, :4])
    np.testing.assert_array_equal(found.rank, 1 + (order == tokens[:, None]).argmax(axis=-1))
