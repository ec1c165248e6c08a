"""gpt-oss: sliding and full layers in turn, attention sinks, a mixture of experts with biases; MXFP4 is unpacked.

OpenAI, 2025, arXiv:2508.10925.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.attention import Attention
from jaxserve.layers.moe import ExpertsConfig, RouterConfig
from jaxserve.models.decoder import make_attention
from jaxserve.models.hf_config import decoder_config, require
from jaxserve.models.moe import MoEConfig, MoEDecoder, MoELayer

_MLP = "model.layers.{}.mlp"


class GptOssLayer(MoELayer):
    @staticmethod
    def make_attention(config: MoEConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Attention:
        return make_attention(config, index, qkv_bias=True, o_bias=True, sinks=True, dtype=dtype, rngs=rngs)


class GptOssForCausalLM(MoEDecoder):
    Layer = GptOssLayer
    HF_NAMES: ClassVar = MoEDecoder.HF_NAMES | {
        "layers.{}.attention.sinks": ("model.layers.{}.self_attn.sinks",),
        "layers.{}.moe.router": (f"{_MLP}.router",),
        "layers.{}.moe.gate_up.weight": (f"{_MLP}.experts.gate_up_proj",),
        "layers.{}.moe.gate_up.bias": (f"{_MLP}.experts.gate_up_proj_bias",),
        "layers.{}.moe.down.weight": (f"{_MLP}.experts.down_proj",),
        "layers.{}.moe.down.bias": (f"{_MLP}.experts.down_proj_bias",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> MoEConfig:
        require(cls.__name__, hf, hidden_act=("silu",), attention_bias=(True,))
        quantization = hf.get("quantization_config") or {}
        require(cls.__name__, quantization, quant_method=("mxfp4",))
        return decoder_config(
            cls.__name__,
            hf | {"attention_bias": False, "quantization_config": None},  # both are built here
            of=MoEConfig,
            layer_types=hf["layer_types"],
            router=RouterConfig(
                num_experts=hf["num_local_experts"], experts_per_token=hf["num_experts_per_tok"], bias=True
            ),
            experts=ExpertsConfig(
                width=hf["intermediate_size"],
                bias=True,
                alpha=hf.get("swiglu_alpha", 1.702),
                limit=hf.get("swiglu_limit", 7.0),
                interleaved=True,
            ),
        )
