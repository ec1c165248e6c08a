"""Phi-3, Phi-3.5 and Phi-4: Llama's decoder; checkpoints hold queries, keys and values, and gate and up, fused."""

from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config, uniform_layer_types
from jaxserve.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    HF_NAMES = LlamaForCausalLM.HF_NAMES | {
        "layers.{}.attention.qkv": ("model.layers.{}.self_attn.qkv_proj",),
        "layers.{}.mlp.gate_up": ("model.layers.{}.mlp.gate_up_proj",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf, layer_types=uniform_layer_types(hf))
