"""Granite 3 (dense): Llama's decoder with multipliers on embeddings, scores, residuals and logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attend, Rope
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config
from jaxserve.models.llama import LlamaForCausalLM, LlamaLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(ModelConfig):
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float


class GraniteLayer(LlamaLayer):
    def __init__(self, config: GraniteConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, index, dtype=dtype, rngs=rngs)
        self.multiplier = config.residual_multiplier

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        x = x + self.multiplier * self.attention(self.input_norm(x), rope, attend, layer)
        return x + self.multiplier * self.mlp(self.post_attention_norm(x))


class GraniteForCausalLM(LlamaForCausalLM):
    config: GraniteConfig
    Layer = GraniteLayer

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> GraniteConfig:
        return decoder_config(
            cls.__name__,
            hf,
            of=GraniteConfig,
            attention_scale=hf["attention_multiplier"],
            embedding_multiplier=hf["embedding_multiplier"],
            residual_multiplier=hf["residual_multiplier"],
            logits_scaling=hf["logits_scaling"],
        )

    def embed(self, token_ids: jax.Array) -> jax.Array:
        return self.config.embedding_multiplier * super().embed(token_ids)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return super().logits(hidden) / self.config.logits_scaling
