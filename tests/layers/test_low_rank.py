"""Products of low rank beside linear layers, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import Linear
from jaxserve.layers.low_rank import LowRank, adapt, adaptable


class TwoLayers(nnx.Module):
    def __init__(self, into: int, blocks: int, parts: tuple[int, ...]):
        settings = {"partition": PartitionSpec(None, None), "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        self.first = Linear(into, blocks * sum(parts), parts=parts, bias=True, **settings)
        self.second = Linear(into, 3, **settings)


@pytest.mark.parametrize(
    ("into", "blocks", "parts", "count", "rank", "rows"),
    [(1, 1, (1,), 1, 1, 1), (37, 3, (5, 1, 2), 4, 3, 9), (8, 2, (4, 4), 2, 6, 5), (40, 1, (7,), 5, 1, 3)],
)
def test_each_row_gets_what_its_own_adapter_adds_to_each_part(
    into: int, blocks: int, parts: tuple[int, ...], count: int, rank: int, rows: int
) -> None:
    random = np.random.default_rng(rows)
    down = random.standard_normal((len(parts), count, rank, into)).astype(np.float32)
    ups = [random.standard_normal((blocks, part, count, rank)).astype(np.float32) for part in parts]
    x = random.standard_normal((rows, into)).astype(np.float32)
    adapters = np.arange(rows, dtype=np.int32)[::-1] % (count + 1)
    model = TwoLayers(into, blocks, parts)
    plain = np.asarray(model.first(x), np.float64)
    low_rank = LowRank(
        jnp.asarray(down.reshape(-1, into)), tuple(jnp.asarray(up.reshape(-1, count * rank)) for up in ups)
    )
    adapt(model, {"first": low_rank}, jnp.asarray(adapters), count=count)

    added = np.zeros((rows, blocks, sum(parts)))
    for row, adapter in enumerate(adapters):
        ends = np.cumsum(parts)
        for part, end in enumerate(ends if adapter else ()):
            product = ups[part][:, :, adapter - 1].astype(np.float64) @ down[part, adapter - 1].astype(np.float64)
            added[row, :, end - parts[part] : end] = product @ x[row]
    found = np.asarray(model.first(x))
    np.testing.assert_allclose(found, plain + added.reshape(rows, -1), rtol=1e-4, atol=1e-4)
    none = adapters == 0
    assert (found[none] == plain[none].astype(np.float32)).all(), "a row without an adapter is what it was, to the bit"
    assert model.second.add is None


def test_linear_layers_are_found_by_their_place() -> None:
    assert list(adaptable(TwoLayers(2, 1, (3,)))) == ["first", "second"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_is_added_is_float32_until_the_layer_rounds_its_sum(dtype: jnp.dtype) -> None:
    low_rank = LowRank(jnp.ones((2, 4), dtype), (jnp.full((3, 2), 1 / 3, dtype),))
    added = jax.eval_shape(
        lambda x: low_rank.of_rows(x, jnp.ones(5, jnp.int32), count=1, parts=(3,)), jnp.ones((5, 4), dtype)
    )
    assert (added.shape, added.dtype) == ((5, 3), jnp.float32)
