"""What adapters add to linear layers: a product of low rank each (LoRA; Hu et al., 2021, arXiv:2106.09685)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.linear import Linear
from pallas_kernels.matmul import matmul_nk


class LowRank(NamedTuple):
    """What `adapters` of a `rank` add to one layer, whose output is fused of `parts` of its own, as `Linear` says.

    All of them are multiplied at once and all but each row's own then zeroed: that takes no sorting, no gathering and
    two products a layer of a width of `adapters * rank`, which a few dozen adapters keep below the layer's own.
    """

    down: Any  # [parts, adapters, rank, in] as a matrix `[:, in]`, of x's dtype
    up: tuple[Any, ...]  # of each part, [its rows of out, adapters * rank]

    def of_rows(self, x: jax.Array, adapters: jax.Array, *, count: int, parts: tuple[int, ...]) -> jax.Array:
        """Float32 `[rows, out]` to add to the layer's output for `x` `[rows, in]`.

        `adapters` int32 `[rows]` are those of the rows: 1 to `count`, or 0 for none.
        """
        rows = len(x)
        inner = matmul_nk(x, self.down).reshape(rows, len(parts), count, -1)
        own = adapters[:, None] == jnp.arange(1, count + 1)
        inner = jnp.where(own[:, None, :, None], inner, 0).astype(x.dtype).reshape(rows, len(parts), -1)
        added = [
            matmul_nk(inner[:, number], up).reshape(rows, -1, part)
            for number, (up, part) in enumerate(zip(self.up, parts, strict=True))
        ]
        return jnp.concatenate(added, axis=-1).reshape(rows, -1)

    def with_adapter(self, own: "LowRank", place: jax.Array, *, count: int) -> "LowRank":
        """The same with `own`, which is of one adapter, in a place from 0 to `count - 1`."""
        parts = len(self.up)
        down = self.down.reshape(parts, count, -1, self.down.shape[1])
        down = down.at[:, place].set(own.down.reshape(parts, -1, own.down.shape[1]))
        ups = [
            up.reshape(len(up), count, -1).at[:, place].set(one).reshape(up.shape)
            for up, one in zip(self.up, own.up, strict=True)
        ]
        return LowRank(down.reshape(self.down.shape), tuple(ups))


def adaptable(model: nnx.Module) -> dict[str, Linear]:
    """The layers of `model` that adapters can add to, by their places in it, such as `layers.0.mlp.down`."""
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def adapt(model: nnx.Module, low_ranks: dict[str, LowRank], adapters: jax.Array, *, count: int) -> None:
    """Let the layers of `model` that stand in `low_ranks` add what the rows' `adapters`, int32 `[rows]`, do."""
    for place, linear in adaptable(model).items():
        if place in low_ranks:
            linear.add = partial(low_ranks[place].of_rows, adapters=adapters, count=count, parts=linear.parts)
