"""OLMo 2: norms only after each block, and over all heads' queries and keys together."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attend, Rope
from jaxserve.layers.norm import RMSNorm
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_attention, make_mlp
from jaxserve.models.hf_config import decoder_config


class OlmoConfig(ModelConfig):
    def splits_over(self, devices: int) -> bool:
        """The norm over all keys has a weight for each stored KV head, so that none can be repeated."""
        return super().splits_over(devices) and self.num_kv_heads % devices == 0


class AllHeadsNorm(RMSNorm):
    def __call__(self, x: jax.Array) -> jax.Array:
        """One norm over the last two axes of `x` `[..., heads, head_dim]`."""
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class OlmoLayer(nnx.Module):
    """Attention and MLP, each followed by a norm and added to the residual stream."""

    def __init__(self, config: OlmoConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        epsilon = config.rms_norm_eps
        self.attention = make_attention(
            config,
            index,
            q_norm=AllHeadsNorm(config.num_heads * config.head_dim, epsilon=epsilon, dtype=dtype),
            k_norm=AllHeadsNorm(config.num_kv_heads * config.head_dim, epsilon=epsilon, dtype=dtype),
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_norm = RMSNorm(config.hidden_size, epsilon=epsilon, dtype=dtype)
        self.mlp = make_mlp(config, dtype=dtype, rngs=rngs)
        self.post_mlp_norm = RMSNorm(config.hidden_size, epsilon=epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        x = x + self.post_attention_norm(self.attention(x, rope, attend, layer))
        return x + self.post_mlp_norm(self.mlp(x))


class Olmo2ForCausalLM(Decoder):
    Layer = OlmoLayer
    HF_NAMES = Decoder.HF_NAMES | {
        "layers.{}.post_attention_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> OlmoConfig:
        return decoder_config(cls.__name__, hf, of=OlmoConfig)
