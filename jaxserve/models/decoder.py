"""What all families share: tokens to hidden states through a stack of layers, and hidden states to logits."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attend, Attention
from jaxserve.layers.embedding import Embedding
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rotary import rope_tables
from jaxserve.models.config import ModelConfig


class Decoder(nnx.Module):
    """A decoder-only transformer. A family brings its `Layer`, the names of its norms, and its config.

    The same class serves (`attend` reads and writes pages) and trains (`attend` is a plain causal attention).
    """

    # Made as `Layer(config, index, dtype=..., rngs=...)` and called as `layer(x, rope, attend, index)`.
    Layer: ClassVar[type[Any]]

    # Each module's name in a HuggingFace checkpoint. A module that fuses several tensors names them in their order, or
    # the one tensor in which the checkpoint holds them one after the other.
    HF_NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "embedding": ("model.embed_tokens",),
        "layers.{}.attention.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
        "layers.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
        "layers.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
        "layers.{}.attention.o": ("model.layers.{}.self_attn.o_proj",),
        "layers.{}.mlp.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        "layers.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
        "norm": ("model.norm",),
        "lm_head": ("lm_head",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """The model's shape from a HuggingFace `config.json`, as `transformers` completes it."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [self.Layer(config, index, dtype=dtype, rngs=rngs) for index in range(config.num_layers)]
        )
        self.norm = self.make_norm(config, dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, token_ids: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """Hidden states `[..., tokens, hidden]` of `token_ids` at `positions`, both int32 `[..., tokens]`.

        Padding has position -1. It begins as zeros and, but for biases, stays that: products on the CPU pass it over.
        """
        ropes = dict.fromkeys(kind.rope for kind in self.config.layer_kinds)
        tables = {rope: rope and rope_tables(positions, rope, self.config.head_dim) for rope in ropes}
        x = jnp.where(positions[..., None] >= 0, self.embed(token_ids), 0)
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_kinds, strict=True)):
            x = layer(x, tables[kind.rope], attend, index)
        return self.norm(x)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        return self.embedding(token_ids)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 `[..., vocab]` of `hidden` `[..., hidden]`."""
        return (self.lm_head or self.embedding).logits(hidden)

    @staticmethod
    def make_norm(config: ModelConfig, dtype: jnp.dtype) -> RMSNorm:
        """The norm before the logits."""
        return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)


def make_attention(config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **variant: Any) -> Attention:
    """The attention of layer `index`, with the keywords of `Attention` that its family sets."""
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    variant |= {"scale": config.attention_scale, "window": config.layer_kinds[index].window}
    return Attention(config.hidden_size, *heads, **variant, dtype=dtype, rngs=rngs)


def make_mlp(config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> GatedMLP:
    return GatedMLP(config.hidden_size, config.intermediate_size, activation=config.activation, dtype=dtype, rngs=rngs)
