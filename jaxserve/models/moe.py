"""Decoders whose feed-forward layers are mixtures of experts, all or some of them."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import InputError
from jaxserve.layers.attention import Attend, Rope
from jaxserve.layers.mlp import gate_up_block
from jaxserve.layers.moe import ExpertsConfig, MixtureOfExperts, RouterConfig
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rotary import rope_tables
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_attention, make_mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(ModelConfig):
    """A decoder with a mixture of experts in every layer but the `dense_layers`."""

    of_linear_layers: ClassVar[bool] = False

    router: RouterConfig
    experts: ExpertsConfig
    shared_width: int = 0  # of the expert that all tokens go through; 0: there is none
    dense_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization is not None:
            raise InputError(
                f"quantization={self.quantization!r} is for linear layers, and most weights of {self.architecture} are "
                "experts', which are not served so; leave it out, or give a checkpoint of another kind"
            )
        router = self.router
        if not 0 < router.kept_groups <= router.groups or router.num_experts % router.groups:
            raise InputError(
                f"config.json asks for {router.kept_groups} of {router.groups} groups of {router.num_experts} experts: "
                "topk_group is from 1 to n_group, and the groups are equal"
            )
        if router.num_experts // router.groups < router.group_score_of:
            raise InputError(
                f"n_group={router.groups} makes groups of {router.num_experts // router.groups} experts, and a group "
                f"is chosen by its best {router.group_score_of}; lower n_group"
            )
        choice = router.num_experts // router.groups * router.kept_groups
        if not 0 < router.experts_per_token <= choice:
            raise InputError(
                f"num_experts_per_tok={router.experts_per_token} is not from 1 to the {choice} to choose from"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - len(self.dense_layers)

    @property
    def mlp_numbers(self) -> int:
        routed = 3 * self.router.experts_per_token * (self.hidden_size + self.experts.width)
        return max(routed + 3 * self.shared_width, 3 * self.intermediate_size if self.dense_layers else 0)

    @property
    def widths(self) -> str:
        return f"{super().widths}, expert width {self.experts.width}"

    def splits_over(self, devices: int) -> bool:
        blocks = self.experts.width // self.experts.block
        shared_blocks = self.shared_width and self.shared_width // gate_up_block(self.shared_width)
        return super().splits_over(devices) and not blocks % devices and not shared_blocks % devices


class MoELayer(nnx.Module):
    """Attention and a mixture of experts, or a plain MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: MoEConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.attention = self.make_attention(config, index, dtype=dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.mlp = make_mlp(config, dtype=dtype, rngs=rngs) if index in config.dense_layers else None
        self.moe = None if index in config.dense_layers else make_moe(config, dtype=dtype, rngs=rngs)

    @staticmethod
    def make_attention(config: Any, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Any:
        """The attention of layer `index`."""
        norms = {
            name: RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
            for name in ("q_norm", "k_norm")
        }
        return make_attention(config, index, qkv_bias=config.qkv_bias, **norms, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int, is_real: jax.Array) -> jax.Array:
        x = x + self.attention(self.input_norm(x), rope, attend, layer)
        h = self.post_attention_norm(x)
        if self.mlp is not None:
            return x + self.mlp(h)
        return x if self.moe is None else x + self.moe(h, is_real)


def make_moe(config: MoEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MixtureOfExperts:
    sizes = config.hidden_size, config.router, config.experts
    return MixtureOfExperts(*sizes, shared_width=config.shared_width, dtype=dtype, rngs=rngs)


class MoEDecoder(Decoder):
    """A decoder of `MoELayer`s, which have to know which tokens are padding: experts are not to be read for it."""

    Layer: ClassVar[type[Any]] = MoELayer
    HF_NAMES: ClassVar = Decoder.HF_NAMES | {
        "layers.{}.input_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.post_attention_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.moe.router": ("model.layers.{}.mlp.gate",),
        "layers.{}.moe.gate_up": tuple(
            f"model.layers.{{}}.mlp.experts.{{{{}}}}.{part}_proj" for part in ("gate", "up")
        ),
        "layers.{}.moe.down": ("model.layers.{}.mlp.experts.{{}}.down_proj",),
    }

    def __call__(self, token_ids: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        is_real = positions >= 0
        ropes = dict.fromkeys(kind.rope for kind in self.config.layer_kinds)
        tables = {rope: rope and rope_tables(positions, rope, self.config.head_dim) for rope in ropes}
        x = self.embed(token_ids)
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_kinds, strict=True)):
            x = layer(x, tables[kind.rope], attend, index, is_real)
        return self.norm(x)
