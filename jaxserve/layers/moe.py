"""A mixture of experts: each token goes through the few feed-forward layers that a router picks for it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import Stack, split_matmul_nk
from jaxserve.layers.mlp import GatedMLP, gate_up_block
from jaxserve.parallel.mesh import TENSOR
from pallas_kernels.grouped_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token's experts and their weights come from the router's logits.

    Scores are `softmax` (over all experts) or `sigmoid` of the logits. Experts are picked by score, plus a learned
    correction if there is one, among the `kept_groups` best of `groups` equal groups of neighbouring experts; a group
    is as good as the sum of its `group_score_of` best. The picked experts' scores, without the correction, are
    divided by their sum if `normalised`, and multiplied by `scale`.
    """

    num_experts: int
    experts_per_token: int
    scoring: str = "softmax"
    bias: bool = False  # on the logits
    correction: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score_of: int = 1
    normalised: bool = True
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """What each expert computes: a gated feed-forward layer of `width`.

    `down(silu(gate(x)) * up(x))`; or, with a `limit`, gpt-oss's `down((up(x) + 1) * gate(x) * sigmoid(alpha *
    gate(x)))` with gates clipped from above and ups from both sides.
    """

    width: int
    bias: bool = False
    alpha: float = 1.0
    limit: float | None = None
    interleaved: bool = False  # how a checkpoint holds gate and up in one tensor: row by row in turn

    @property
    def block(self) -> int:
        """Rows in one block of the fused gate-up weight."""
        return 1 if self.interleaved else gate_up_block(self.width)


class Router(nnx.Module):
    """Which experts each token goes to, and with which weights. Computed in float32."""

    def __init__(self, hidden_size: int, config: RouterConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        experts = config.num_experts
        whole: dict[str, Any] = {"partition": PartitionSpec(), "parts": (experts,)}
        self.config = config
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (experts, hidden_size), dtype), **whole)
        self.bias = nnx.Param(jnp.zeros((experts,), dtype), **whole) if config.bias else None
        # Rounded to bfloat16 it would change which experts are picked.
        self.correction = nnx.Param(jnp.zeros((experts,), jnp.float32), **whole) if config.correction else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[tokens, hidden]` to experts and their weights, int32 and float32 `[tokens, experts_per_token]`."""
        config = self.config
        logits = split_matmul_nk(x, self.weight[...], PartitionSpec())
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        scores = jax.nn.softmax(logits, axis=-1) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if self.correction is None else scores + self.correction[...]
        if config.groups > 1:
            grouped = choice.reshape(len(x), config.groups, -1)
            group_scores = jax.lax.top_k(grouped, config.group_score_of)[0].sum(axis=-1)
            _, kept = jax.lax.top_k(group_scores, config.kept_groups)
            is_kept = (kept[..., None] == jnp.arange(config.groups)).any(axis=1)
            choice = jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
        _, experts = jax.lax.top_k(choice, config.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.normalised:
            weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
        return experts, weights * config.scale


class StackedLinear(nnx.Module):
    """The weights `[experts, out, in]` of one linear layer of every expert, and biases `[experts, out]`.

    `parts` is `Linear`'s, of each expert's rows; `axis` says which of out and in is split over the mesh.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        axis: int,
        parts: tuple[int, ...],
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        split = (TENSOR, None) if axis == 0 else (None, TENSOR)
        weight = nnx.initializers.normal(0.02)(rngs.params(), (experts, out_features, in_features), dtype)
        self.weight = nnx.Param(weight, partition=PartitionSpec(None, *split), parts=parts, stacked=Stack())
        biases: dict[str, Any] = {"partition": PartitionSpec(None, split[0]), "parts": parts, "stacked": Stack()}
        self.bias = nnx.Param(jnp.zeros((experts, out_features), dtype), **biases) if bias else None


class MixtureOfExperts(nnx.Module):
    """Routed experts (Shazeer et al., 2017, arXiv:1701.06538), and one that all tokens share if it has a width.

    Rows are sorted by expert, so that a step costs what the experts that it uses cost. Each expert's width is split
    over the mesh that is in context (`jax.set_mesh`); without one all is left to XLA's partitioner.
    """

    def __init__(
        self,
        hidden_size: int,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        shared_width: int = 0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = experts
        stack: dict[str, Any] = {"bias": experts.bias, "dtype": dtype, "rngs": rngs}
        gate_up_parts = (2 * experts.width,) if experts.interleaved else (experts.block, experts.block)
        self.router = Router(hidden_size, router, dtype=dtype, rngs=rngs)
        self.gate_up = StackedLinear(
            router.num_experts, hidden_size, 2 * experts.width, axis=0, parts=gate_up_parts, **stack
        )
        self.down = StackedLinear(router.num_experts, experts.width, hidden_size, axis=1, parts=(hidden_size,), **stack)
        self.shared = GatedMLP(hidden_size, shared_width, dtype=dtype, rngs=rngs) if shared_width else None

    def __call__(self, x: jax.Array, is_real: jax.Array) -> jax.Array:
        """`[..., tokens, hidden]` to the same; tokens that are not `is_real`, bool `[..., tokens]`, use no expert."""
        rows = x.reshape(-1, x.shape[-1])
        experts, weights = self.router(rows)
        is_real = jnp.broadcast_to(is_real, x.shape[:-1]).reshape(-1, 1)
        routed = self.route(rows, jnp.where(is_real, experts, self.router.config.num_experts), weights)
        if self.down.bias is not None:
            routed += (weights[..., None] * self.down.bias[...][experts].astype(jnp.float32)).sum(axis=1)
        out = routed.astype(x.dtype).reshape(x.shape)
        return out if self.shared is None else out + self.shared(x)

    def route(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """The weighted sums of the experts' outputs without their last bias, float32 `[tokens, hidden]`.

        `x` `[tokens, hidden]`; `experts` int32 and `weights` float32 `[tokens, experts_per_token]`, as `Router` gives
        them, an expert's number past the last one meaning none.
        """
        parameters = {"gate_up": self.gate_up.weight[...], "down": self.down.weight[...]}
        split = {"gate_up": self.gate_up.weight, "down": self.down.weight}
        if self.gate_up.bias is not None:
            parameters["bias"], split["bias"] = self.gate_up.bias[...], self.gate_up.bias
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.shape[TENSOR] == 1:
            return self._on_one_device(x, experts, weights, parameters)
        whole = PartitionSpec()
        run = jax.shard_map(
            lambda *arguments: jax.lax.psum(self._on_one_device(*arguments), TENSOR),
            in_specs=(whole, whole, whole, {name: p.get_metadata()["partition"] for name, p in split.items()}),
            out_specs=whole,
            check_vma=False,
        )
        return run(x, experts, weights, parameters)

    def _on_one_device(
        self, x: jax.Array, experts: jax.Array, weights: jax.Array, parameters: dict[str, jax.Array]
    ) -> jax.Array:
        num_experts, per_token = len(parameters["gate_up"]), experts.shape[1]
        by_expert = jnp.argsort(experts.reshape(-1))
        sizes = jnp.zeros(num_experts, jnp.int32).at[experts].add(1, mode="drop")  # of padding: an expert too many
        gate_up = grouped_matmul(x[by_expert // per_token], parameters["gate_up"], sizes)
        if "bias" in parameters:
            gate_up += parameters["bias"].at[experts.reshape(-1)[by_expert]].get(mode="clip")
        hidden = self._activate(gate_up.reshape(len(gate_up), -1, 2, self.config.block))
        out = grouped_matmul(hidden.reshape(len(gate_up), -1), parameters["down"], sizes)
        out = out[jnp.argsort(by_expert)].reshape(*experts.shape, -1)
        return (weights[..., None] * out.astype(jnp.float32)).sum(axis=1)

    def _activate(self, gate_up: jax.Array) -> jax.Array:
        """`[..., 2, block]` to `[..., block]`."""
        gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        if self.config.limit is None:
            return jax.nn.silu(gate) * up
        gate, up = jnp.minimum(gate, self.config.limit), jnp.clip(up, -self.config.limit, self.config.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.config.alpha * gate)
