"""Matrix products with weights `[out, in]`, as HuggingFace has them: a checkpoint's bytes are used as they lie."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.errors import InputError
from jaxserve.layers.quantisation import INT4, Quantised, made, usual_group
from pallas_kernels.matmul import matmul_nk, matmul_nk_int4, runs_in_a_kernel


def split_matmul_nk(x: jax.Array, weight: jax.Array, partition: PartitionSpec) -> jax.Array:
    """`matmul_nk` with a weight that is split so over the mesh in context (`jax.set_mesh`), if there is one."""
    return _split(matmul_nk, x, (weight,), partition)


def _split(
    product: Callable[..., jax.Array], x: jax.Array, weights: tuple[jax.Array, ...], partition: PartitionSpec
) -> jax.Array:
    """`product(x, *weights)` `[..., out]` of weights `[out, ...]` that are all split so.

    XLA's partitioner splits its own products. Those of a kernel it cannot: each device multiplies its part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if mesh.size < 2 or device is None or not runs_in_a_kernel(x.dtype, weights[0].dtype, device.platform):
        return product(x, *weights)
    out, into = (*partition, None, None)[:2]
    rows = (None,) * (x.ndim - 1)

    def of_own_part(x: jax.Array, *weights: jax.Array) -> jax.Array:
        y = product(x, *weights)
        return y if into is None else jax.lax.psum(y, into)

    return jax.shard_map(
        of_own_part,
        in_specs=(PartitionSpec(*rows, into), *[PartitionSpec(out, into)] * len(weights)),
        out_specs=PartitionSpec(*rows, out),
        check_vma=False,
    )(x, *weights)


class Stack(NamedTuple):
    """How a checkpoint holds a parameter whose first axis counts the matrices of many experts or heads.

    A tensor for each, or one of all with in- and output axes exchanged; or, with a `block`, one `[count * block, in]`,
    of which each matrix is the rows from `first` on of its block.
    """

    block: int = 0
    first: int = 0


def quantised(parameter: nnx.Variable) -> Quantised | None:
    """What `parameter` is of a quantised weight; None if it is nothing of one."""
    return parameter.get_metadata().get("quantised")


class Linear(nnx.Module):
    """`y = x Wᵀ + b`, accumulated in float32.

    Two facts about each parameter travel in its metadata. `partition` says which axes are split over the mesh.
    `parts` says how the rows of several of a checkpoint's tensors are fused into one: in repeating blocks, each made
    of `parts[0]` rows of the first tensor, `parts[1]` of the second, and so on. A third, `quantised`, is there once
    `quantise` was called.
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
        self.in_features = in_features
        parts = parts or (out_features,)
        weight = nnx.initializers.normal(0.02)(rngs.params(), (out_features, in_features), dtype)
        self.weight = nnx.Param(weight, partition=partition, parts=parts)
        bias_partition = PartitionSpec(partition[0])
        self.bias = (
            nnx.Param(jnp.zeros((out_features,), dtype), partition=bias_partition, parts=parts) if bias else None
        )
        self.scale: nnx.Param | None = nnx.data(None)
        self.zero: nnx.Param | None = nnx.data(None)
        self.add: Callable[[jax.Array], jax.Array] | None = None  # of `x`, float32: what adapters add to the output

    @property
    def parts(self) -> tuple[int, ...]:
        return self.weight.get_metadata()["parts"]

    def quantise(self, kind: str, *, group: int | None = None, devices: int = 1) -> None:
        """Keep the weight in numbers of `kind`, with a `scale`, and in `int4` a `zero`: see `quantisation.made`.

        `group` is how many neighbours have one scale in `int4`, or what is usual; `devices` are those that rows of the
        weight are split over, if they are.
        """
        weight, metadata = self.weight[...], self.weight.get_metadata()
        partition, parts = metadata["partition"], metadata["parts"]
        sizes, scale_partition = (0, 1), PartitionSpec(partition[0])
        if kind == INT4:
            group = group or usual_group(self.in_features)
            own = self.in_features // (1 if partition[1] is None else devices)
            if self.in_features % group or own % 2:
                raise InputError(
                    f"a layer has {self.in_features} inputs, {own} on a device, and in int4 they are whole groups of "
                    f"{group}, an even number on each; take another quantization, or fewer devices"
                )
            sizes, scale_partition = (group, group // math.gcd(group, own)), partition

        def parameter(part: str, partition: PartitionSpec) -> nnx.Param:
            role = Quantised(kind, part, *sizes)
            return nnx.Param(made(weight, role), partition=partition, parts=parts, quantised=role)

        self.weight = parameter("weight", partition)
        self.scale = parameter("scale", scale_partition)
        if kind == INT4:
            self.zero = parameter("zero", scale_partition)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`, in `x`'s dtype."""
        weight, partition = self.weight[...], self.weight.get_metadata()["partition"]
        if self.scale is not None and self.zero is not None:
            y = _split(matmul_nk_int4, x, (weight, self.scale[...], self.zero[...]), partition)
        else:
            y = split_matmul_nk(x, weight, partition)
            if self.scale is not None:
                y *= self.scale[...]
        if self.add is not None:
            y += self.add(x)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
