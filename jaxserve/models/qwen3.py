"""Qwen3 (dense): Llama's decoder with a norm on every head's query and key."""

from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import LlamaForCausalLM, decoder_config


class Qwen3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf, qk_norm=True)
