"""Qwen2 and Qwen2.5: Llama's decoder with biases on queries, keys and values."""

from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config
from jaxserve.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf, layer_types=hf.get("layer_types"), qkv_bias=True)
