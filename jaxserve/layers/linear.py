"""Matrix products with weights `[out, in]`, as HuggingFace has them: a checkpoint's bytes are used as they lie."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.quantisation import rounded, scales
from pallas_kernels.matmul import matmul_nk, products_run_natively


def split_matmul_nk(x: jax.Array, weight: jax.Array, partition: PartitionSpec) -> jax.Array:
    """`matmul_nk` with a weight that is split so over the mesh in context (`jax.set_mesh`), if there is one.

    XLA's partitioner splits its own products. Those of the CPU's kernel it cannot: each device multiplies its part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if mesh.size < 2 or device is None or not products_run_natively(x.dtype, device.platform):
        return matmul_nk(x, weight)
    out, into = (*partition, None, None)[:2]
    rows = (None,) * (x.ndim - 1)

    def of_own_part(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = matmul_nk(x, weight)
        return y if into is None else jax.lax.psum(y, into)

    return jax.shard_map(
        of_own_part,
        in_specs=(PartitionSpec(*rows, into), PartitionSpec(out, into)),
        out_specs=PartitionSpec(*rows, out),
        check_vma=False,
    )(x, weight)


class Stack(NamedTuple):
    """How a checkpoint holds a parameter whose first axis counts the matrices of many experts or heads.

    A tensor for each, or one of all with in- and output axes exchanged; or, with a `block`, one `[count * block, in]`,
    of which each matrix is the rows from `first` on of its block.
    """

    block: int = 0
    first: int = 0


class EightBits(NamedTuple):
    """What a parameter is of a weight in eight bits, a kind of `quantisation.KINDS`: the weight or its scale."""

    kind: str
    is_scale: bool


def eight_bits(parameter: nnx.Variable) -> EightBits | None:
    """None of a parameter that is nothing of the kind."""
    return parameter.get_metadata().get("eight_bits")


class Linear(nnx.Module):
    """`y = x Wᵀ + b`, accumulated in float32.

    Two facts about each parameter travel in its metadata. `partition` says which axes are split over the mesh.
    `parts` says how the rows of several of a checkpoint's tensors are fused into one: in repeating blocks, each made
    of `parts[0]` rows of the first tensor, `parts[1]` of the second, and so on.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        partition: PartitionSpec,
        parts: tuple[int, ...] = (),
        bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        parts = parts or (out_features,)
        weight = nnx.initializers.normal(0.02)(rngs.params(), (out_features, in_features), dtype)
        self.weight = nnx.Param(weight, partition=partition, parts=parts)
        bias_partition = PartitionSpec(partition[0])
        self.bias = (
            nnx.Param(jnp.zeros((out_features,), dtype), partition=bias_partition, parts=parts) if bias else None
        )
        self.scale: nnx.Param | None = nnx.data(None)
        self.add: Callable[[jax.Array], jax.Array] | None = None  # of `x`, float32: what adapters add to the output

    @property
    def parts(self) -> tuple[int, ...]:
        return self.weight.get_metadata()["parts"]

    def quantise(self, kind: str) -> None:
        """Keep the weight in eight bits, with a `scale` float32 `[out]`."""
        weight, metadata = self.weight[...], self.weight.get_metadata()
        scale, partition, parts = scales(weight, kind), metadata["partition"], metadata["parts"]
        self.weight = nnx.Param(
            rounded(weight, scale, kind), partition=partition, parts=parts, eight_bits=EightBits(kind, is_scale=False)
        )
        self.scale = nnx.Param(
            scale, partition=PartitionSpec(partition[0]), parts=parts, eight_bits=EightBits(kind, is_scale=True)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`, in `x`'s dtype."""
        y = split_matmul_nk(x, self.weight[...], self.weight.get_metadata()["partition"])
        if self.scale is not None:
            y *= self.scale[...]
        if self.add is not None:
            y += self.add(x)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
