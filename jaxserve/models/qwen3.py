"""Qwen3 (dense): Llama's decoder with a norm on every head's query and key."""

from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config
from jaxserve.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf, layer_types=hf.get("layer_types"), qk_norm=True)
