"""Llama 2, 3, 3.1, 3.2: norms before attention and MLP, grouped heads; many families share its layers."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attend, Rope
from jaxserve.layers.norm import RMSNorm
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_attention, make_mlp
from jaxserve.models.hf_config import decoder_config


class LlamaLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def norm(features: int) -> RMSNorm:
            return RMSNorm(features, epsilon=config.rms_norm_eps, dtype=dtype)

        self.input_norm = norm(config.hidden_size)
        self.attention = make_attention(
            config,
            index,
            qkv_bias=config.qkv_bias,
            q_norm=norm(config.head_dim) if config.qk_norm else None,
            k_norm=norm(config.head_dim) if config.qk_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_norm = norm(config.hidden_size)
        self.mlp = make_mlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        x = x + self.attention(self.input_norm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_norm(x))


class LlamaForCausalLM(Decoder):
    Layer: ClassVar[type[LlamaLayer]] = LlamaLayer
    HF_NAMES = Decoder.HF_NAMES | {
        "layers.{}.input_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.post_attention_norm": ("model.layers.{}.post_attention_layernorm",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf)
