"""Mistral, Mistral Nemo and Small: Llama's decoder, with a window over all layers where the config has one."""

from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config, uniform_layer_types
from jaxserve.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf, layer_types=uniform_layer_types(hf))
