"""DeepSeek-V2 and V3: multi-head latent attention with latents in the cache, shared and routed experts.

DeepSeek-AI, 2024, arXiv:2405.04434 and arXiv:2412.19437.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import InputError
from jaxserve.layers.latent_attention import LatentAttention
from jaxserve.layers.moe import ExpertsConfig, RouterConfig
from jaxserve.layers.rotary import yarn_mscale
from jaxserve.models.hf_config import decoder_config, require
from jaxserve.models.moe import MoEConfig, MoEDecoder, MoELayer

_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(MoEConfig):
    """`head_dim` is the rotated part of queries and keys; a token's one KV head in the cache is its latent."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int  # of each query and key, beside the rotated part
    v_head_dim: int
    interleaved_rope: bool = True

    @property
    def key_dim(self) -> int:
        return self.kv_rank + self.head_dim

    @property
    def value_dim(self) -> int:
        return 0

    @property
    def scale(self) -> float:
        """Of attention's scores."""
        rope = self.layer_kinds[0].rope
        mscale = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope and rope.mscale_all_dim else 1.0
        return (self.nope_dim + self.head_dim) ** -0.5 * mscale**2


class DeepseekLayer(MoELayer):
    @staticmethod
    def make_attention(config: DeepseekConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> LatentAttention:
        return LatentAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            q_rank=config.q_rank,
            kv_rank=config.kv_rank,
            nope_dim=config.nope_dim,
            rope_dim=config.head_dim,
            value_dim=config.v_head_dim,
            interleaved_rope=config.interleaved_rope,
            scale=config.scale,
            dtype=dtype,
            rngs=rngs,
        )


class DeepseekV2ForCausalLM(MoEDecoder):
    Layer = DeepseekLayer
    HF_NAMES: ClassVar = MoEDecoder.HF_NAMES | {
        "layers.{}.attention.q": (f"{_ATTENTION}.q_proj",),
        "layers.{}.attention.q.down": (f"{_ATTENTION}.q_a_proj",),
        "layers.{}.attention.q.norm": (f"{_ATTENTION}.q_a_layernorm",),
        "layers.{}.attention.q.up": (f"{_ATTENTION}.q_b_proj",),
        "layers.{}.attention.kv_down": (f"{_ATTENTION}.kv_a_proj_with_mqa",),
        "layers.{}.attention.kv_norm": (f"{_ATTENTION}.kv_a_layernorm",),
        "layers.{}.attention.up_k": (f"{_ATTENTION}.kv_b_proj.weight",),
        "layers.{}.attention.up_v": (f"{_ATTENTION}.kv_b_proj.weight",),
        "layers.{}.moe.router.correction": (f"{_MLP}.gate.e_score_correction_bias",),
        "layers.{}.moe.shared.gate_up": (f"{_MLP}.shared_experts.gate_proj", f"{_MLP}.shared_experts.up_proj"),
        "layers.{}.moe.shared.down": (f"{_MLP}.shared_experts.down_proj",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> DeepseekConfig:
        # `transformers` reads neither of them, and other readers disagree on what they would mean.
        require(cls.__name__, hf, scoring_func=("softmax",), norm_topk_prob=(False,))
        methods: dict[str, dict[str, Any]] = {"greedy": {}, "group_limited_greedy": _groups(hf)}
        require(cls.__name__, hf, topk_method=tuple(methods))
        return _config(cls.__name__, hf, RouterConfig(normalised=False, **_routing(hf), **methods[hf["topk_method"]]))


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> DeepseekConfig:
        require(cls.__name__, hf, scoring_func=("sigmoid",), topk_method=("noaux_tc",))
        router = RouterConfig(
            scoring="sigmoid",
            correction=True,
            group_score_of=2,
            normalised=hf["norm_topk_prob"],
            **_routing(hf),
            **_groups(hf),
        )
        # The layers behind the last one predict a second token, in training.
        behind = range(hf["num_hidden_layers"], hf["num_hidden_layers"] + (hf.get("num_nextn_predict_layers") or 0))
        return _config(
            cls.__name__,
            hf,
            router,
            interleaved_rope=hf.get("rope_interleave", True),
            unused_tensors=tuple(f"model.layers.{index}." for index in behind),
        )


def _routing(hf: dict[str, Any]) -> dict[str, Any]:
    if not hf.get("num_experts_per_tok"):
        raise InputError("config.json gives no num_experts_per_tok; give how many experts each token goes to")
    return {
        "num_experts": hf["n_routed_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "scale": hf["routed_scaling_factor"],
    }


def _groups(hf: dict[str, Any]) -> dict[str, Any]:
    return {"groups": hf.get("n_group") or 1, "kept_groups": hf.get("topk_group") or 1}


def _config(architecture: str, hf: dict[str, Any], router: RouterConfig, **settings: Any) -> DeepseekConfig:
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    require(architecture, hf, hidden_act=("silu",), moe_layer_freq=(1,), num_key_value_heads=(heads, None))
    return decoder_config(
        architecture,
        hf | {"num_key_value_heads": 1, "head_dim": hf["qk_rope_head_dim"]},
        of=DeepseekConfig,
        router=router,
        experts=ExpertsConfig(width=hf["moe_intermediate_size"]),
        shared_width=hf["moe_intermediate_size"] * (hf["n_shared_experts"] or 0),
        dense_layers=frozenset(range(min(hf["first_k_dense_replace"], layers))),
        q_rank=hf["q_lora_rank"],
        kv_rank=hf["kv_lora_rank"],
        nope_dim=hf["qk_nope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        **settings,
    )
