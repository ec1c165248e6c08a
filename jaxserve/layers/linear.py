"""Matrix products with weights `[out, in]`, as HuggingFace has them: a checkpoint's bytes are used as they lie."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from pallas_kernels.matmul import matmul_nk


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

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`, in `x`'s dtype."""
        y = matmul_nk(x, self.weight[...])
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
