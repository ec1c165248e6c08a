"""Gemma 2: norms before and after each block, soft-capped scores and logits, every other layer with a window."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attend, Rope
from jaxserve.layers.norm import RMSNorm
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_attention, make_mlp
from jaxserve.models.hf_config import decoder_config, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    attention_soft_cap: float | None
    logits_soft_cap: float | None


class GemmaNorm(RMSNorm):
    """Multiplies by one and the weight together, so that a weight of zero changes nothing."""

    def __init__(self, features: int, config: ModelConfig, dtype: jnp.dtype):
        super().__init__(features, epsilon=config.rms_norm_eps, offset=1.0, dtype=dtype)


class GemmaLayer(nnx.Module):
    """Attention and MLP, each between two norms and added to the residual stream."""

    def __init__(self, config: GemmaConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = GemmaNorm(config.hidden_size, config, dtype)
        self.attention = make_attention(
            config,
            index,
            soft_cap=config.attention_soft_cap,
            q_norm=GemmaNorm(config.head_dim, config, dtype) if config.qk_norm else None,
            k_norm=GemmaNorm(config.head_dim, config, dtype) if config.qk_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_norm = GemmaNorm(config.hidden_size, config, dtype)
        self.pre_mlp_norm = GemmaNorm(config.hidden_size, config, dtype)
        self.mlp = make_mlp(config, dtype=dtype, rngs=rngs)
        self.post_mlp_norm = GemmaNorm(config.hidden_size, config, dtype)

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        x = x + self.post_attention_norm(self.attention(self.input_norm(x), rope, attend, layer))
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))


class Gemma2ForCausalLM(Decoder):
    config: GemmaConfig
    Layer = GemmaLayer
    HF_NAMES = Decoder.HF_NAMES | {
        "layers.{}.input_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.post_attention_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.pre_mlp_norm": ("model.layers.{}.pre_feedforward_layernorm",),
        "layers.{}.post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> GemmaConfig:
        return gemma_config(cls.__name__, hf)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        x = self.embedding(token_ids)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits, cap = super().logits(hidden), self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @staticmethod
    def make_norm(config: ModelConfig, dtype: jnp.dtype) -> RMSNorm:
        return GemmaNorm(config.hidden_size, config, dtype)


def gemma_config(architecture: str, hf: dict[str, Any], **settings: Any) -> GemmaConfig:
    require(architecture, hf, use_bidirectional_attention=(False, None))
    return decoder_config(
        architecture,
        hf,
        of=GemmaConfig,
        layer_types=hf["layer_types"],
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_soft_cap=hf["attn_logit_softcapping"],
        logits_soft_cap=hf["final_logit_softcapping"],
        **settings,
    )
