"""Llama (2, 3, 3.1, 3.2), and the plain decoder that its relatives differ from in a few settings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import InputError
from jaxserve.layers.attention import Attend, Attention
from jaxserve.layers.embedding import Embedding
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rotary import ROPE_KINDS, RopeConfig, inverse_frequencies, rope_tables
from jaxserve.models.config import ModelConfig


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            qk_norm_epsilon=config.rms_norm_eps if config.qk_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, layer: int) -> jax.Array:
        x = x + self.attention(self.input_norm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_norm(x))


class LlamaForCausalLM(nnx.Module):
    """A decoder that maps tokens to hidden states, and hidden states to logits.

    The same class serves (`attend` reads and writes pages) and trains (`attend` is a plain causal attention).
    """

    # Each module's name in a HuggingFace checkpoint; the tensors of several names are fused into one, in this order.
    HF_NAMES = {
        "embedding": ("model.embed_tokens",),
        "layers.{}.input_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.attention.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
        "layers.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
        "layers.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
        "layers.{}.attention.o": ("model.layers.{}.self_attn.o_proj",),
        "layers.{}.post_attention_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.mlp.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        "layers.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
        "norm": ("model.norm",),
        "lm_head": ("lm_head",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """The model's shape from a HuggingFace `config.json`, as `transformers` completes it."""
        return decoder_config(cls.__name__, hf)

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, token_ids: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """Hidden states `[..., tokens, hidden]` of `token_ids` at `positions`, both int32 `[..., tokens]`."""
        rope = rope_tables(positions, inverse_frequencies(self.config.rope, self.config.head_dim))
        x = self.embedding(token_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, attend, index)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 `[..., vocab]` of `hidden` `[..., hidden]`."""
        return (self.lm_head or self.embedding).logits(hidden)


# What a config may ask for beyond this decoder, with the one value of each that is built.
_ONLY = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
}


def decoder_config(
    architecture: str, hf: dict[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False
) -> ModelConfig:
    """The fields that Llama and its relatives share; refuses by name what this decoder does not do."""
    for field, built in _ONLY.items():
        if hf.get(field, built) != built:
            raise InputError(f"config.json says {field}={hf[field]!r}, and {architecture} is built for {built!r} only")
    if hf.get("attention_bias"):
        raise InputError(
            f"config.json says attention_bias=true, and {architecture} has no bias on its output projection here"
        )
    rope = dict(hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise InputError(f"config.json says rope_type={kind!r}; built are {', '.join(ROPE_KINDS)}")
    heads = hf["num_attention_heads"]
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_position_embeddings=hf["max_position_embeddings"],
        rope=RopeConfig(
            theta=rope.get("rope_theta", 10_000.0),
            kind=kind,
            **{name: rope[name] for name in RopeConfig.SCALING_FIELDS if rope.get(name) is not None},
        ),
        rms_norm_eps=hf["rms_norm_eps"],
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
