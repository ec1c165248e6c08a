"""GLM-4 (0414): norms before and after each block, and half of each head rotated, in neighbouring pairs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attend, Rope
from jaxserve.layers.norm import RMSNorm
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_attention, make_mlp
from jaxserve.models.hf_config import decoder_config


class Glm4Layer(nnx.Module):
    """Attention and MLP, each between two norms and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)

        self.input_norm = norm()
        self.attention = make_attention(
            config, index, qkv_bias=config.qkv_bias, interleaved_rope=True, dtype=dtype, rngs=rngs
        )
        self.post_attention_norm = norm()
        self.pre_mlp_norm = norm()
        self.mlp = make_mlp(config, dtype=dtype, rngs=rngs)
        self.post_mlp_norm = norm()

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        x = x + self.post_attention_norm(self.attention(self.input_norm(x), rope, attend, layer))
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))


class Glm4ForCausalLM(Decoder):
    Layer = Glm4Layer
    HF_NAMES = Decoder.HF_NAMES | {
        "layers.{}.input_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.post_attention_norm": ("model.layers.{}.post_self_attn_layernorm",),
        "layers.{}.pre_mlp_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.mlp.gate_up": ("model.layers.{}.mlp.gate_up_proj",),
        "layers.{}.post_mlp_norm": ("model.layers.{}.post_mlp_layernorm",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        without_bias = hf | {"attention_bias": False}  # here it is of queries, keys and values only
        return decoder_config(cls.__name__, without_bias, qkv_bias=bool(hf["attention_bias"]))
