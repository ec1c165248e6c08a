"""The gated feed-forward layer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import Linear


def gate_up_block(intermediate_size: int) -> int:
    """Rows in one block of the fused gate-up weight, whose blocks alternate: gate, up, gate, up, …

    The block is chosen so that eight devices can share the blocks evenly wherever the size allows it, and does not
    depend on the mesh: one stored weight serves every mesh.
    """
    return math.gcd(intermediate_size // math.gcd(intermediate_size, 8), 128)


class GatedMLP(nnx.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202): `down(silu(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block = gate_up_block(intermediate_size)
        self.gate_up = Linear(
            hidden_size,
            2 * intermediate_size,
            partition=PartitionSpec("tensor", None),
            parts=(self.block, self.block),
            dtype=dtype,
            rngs=rngs,
        )
        self.down = Linear(
            intermediate_size, hidden_size, partition=PartitionSpec(None, "tensor"), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., hidden]` to the same."""
        gate_up = self.gate_up(x).reshape(*x.shape[:-1], -1, 2, self.block).astype(jnp.float32)
        hidden = (jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]).astype(x.dtype)
        # XLA's loop for the CPU runs over the barrier's shape: over blocks it is vectorised, over whole rows it is not.
        return self.down(jax.lax.optimization_barrier(hidden).reshape(*x.shape[:-1], -1))
