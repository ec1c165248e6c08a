"""A mixture of experts against a loop over tokens, with padding, and over several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.layers.moe import ExpertsConfig, MixtureOfExperts, Router, RouterConfig
from jaxserve.parallel.mesh import make_mesh, parameter_shardings

HIDDEN, WIDTH, EXPERTS = 24, 16, 6
ROUTER = RouterConfig(num_experts=EXPERTS, experts_per_token=2)
VARIANTS = {
    "plain": (ROUTER, ExpertsConfig(width=WIDTH)),
    "biases-and-limit": (
        RouterConfig(num_experts=EXPERTS, experts_per_token=3, bias=True),
        ExpertsConfig(width=WIDTH, bias=True, alpha=1.7, limit=0.05, interleaved=True),
    ),
}


def layer(variant: str) -> MixtureOfExperts:
    """Of random weights, biases included."""
    moe = MixtureOfExperts(HIDDEN, *VARIANTS[variant], dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    graph, state = nnx.split(moe)
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda p: jnp.asarray(0.3 * random.normal(size=p.shape), p.dtype), state)
    return nnx.merge(graph, state)


def one_by_one(moe: MixtureOfExperts, x: np.ndarray) -> np.ndarray:
    """What each token of `x` `[tokens, hidden]` becomes, an expert at a time in float64."""
    config, block = moe.config, moe.config.block
    gate_ups, downs = np.asarray(moe.gate_up.weight[...], np.float64), np.asarray(moe.down.weight[...], np.float64)
    biases = [np.asarray(linear.bias[...]) if config.bias else np.zeros(EXPERTS) for linear in (moe.gate_up, moe.down)]
    experts, weights = (np.asarray(array, np.float64) for array in moe.router(jnp.asarray(x)))
    out = np.zeros_like(x, np.float64)
    for token, row in enumerate(np.asarray(x, np.float64)):
        for expert, weight in zip(experts[token].astype(int), weights[token], strict=True):
            gate_up = gate_ups[expert] @ row + biases[0][expert]
            gate, up = gate_up.reshape(-1, 2, block).transpose(1, 0, 2).reshape(2, -1)
            if config.limit is not None:
                gate, up = np.minimum(gate, config.limit), np.clip(up, -config.limit, config.limit) + 1
            hidden = gate / (1 + np.exp(-config.alpha * gate)) * up
            out[token] += weight * (downs[expert] @ hidden + biases[1][expert])
    return out


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(13, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_loop_over_tokens_and_experts(variant: str, tokens: np.ndarray) -> None:
    moe = layer(variant)
    found = moe(jnp.asarray(tokens), jnp.ones(len(tokens), bool))
    np.testing.assert_allclose(found, one_by_one(moe, tokens), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("devices", [1, 4])
def test_each_device_computes_its_part_of_every_expert(variant: str, devices: int, tokens: np.ndarray) -> None:
    expected = one_by_one(layer(variant), tokens)
    graph, state = nnx.split(layer(variant))
    mesh = make_mesh(devices)
    state = jax.device_put(state, parameter_shardings(mesh, state))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, jnp.ones(len(x), bool)))
        compiled = run.lower(state, tokens).compile()
    np.testing.assert_allclose(compiled(state, tokens), expected, atol=1e-5)
    shapes = {shard.data.shape for shard in state["down"]["weight"][...].addressable_shards}
    assert shapes == {(EXPERTS, HIDDEN, WIDTH // devices)}
    assert compiled.as_text().count("all-reduce-start(") + compiled.as_text().count("all-reduce(") == (devices > 1)


def test_experts_of_padding_alone_are_not_used(tokens: np.ndarray) -> None:
    """Their weights are NaN, which any use of them would carry into the result of a whole tile."""
    moe = layer("plain")
    expected = one_by_one(moe, tokens)
    used = np.asarray(moe.router(jnp.asarray(tokens))[0])
    real = ~(used == used[0, 0]).any(axis=1)  # all but the tokens of one expert
    unused = np.setdiff1d(np.arange(EXPERTS), used[real])
    assert 0 < real.sum() < len(real)
    assert len(unused)
    moe.down.weight[...] = moe.down.weight[...].at[unused].set(np.nan)
    found = np.asarray(moe(jnp.asarray(tokens), jnp.asarray(real)))
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    assert not found[~real].any()


def test_groups_of_experts_are_chosen_by_their_best() -> None:
    """Of six experts in three groups, one group of which the best expert, or the best two together, are chosen."""
    logits = jnp.asarray([[0.9, 0.0, 0.6, 0.6, 0.5, 0.4]])
    for group_score_of, chosen in ((1, {0, 1}), (2, {2, 3})):
        config = RouterConfig(
            num_experts=6,
            experts_per_token=2,
            scoring="sigmoid",
            groups=3,
            kept_groups=1,
            group_score_of=group_score_of,
            normalised=False,
            scale=2.0,
        )
        router = Router(6, config, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
        router.weight[...] = jnp.eye(6)
        experts, weights = router(logits)
        assert set(experts[0].tolist()) == chosen
        np.testing.assert_allclose(weights[0], 2 / (1 + np.exp(-np.asarray(logits)[0, experts[0]])), rtol=1e-6)
