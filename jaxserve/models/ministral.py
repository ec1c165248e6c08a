"""Ministral: Llama's decoder with sliding and full layers as its config lists them."""

from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config
from jaxserve.models.llama import LlamaForCausalLM


class MinistralForCausalLM(LlamaForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        return decoder_config(cls.__name__, hf, layer_types=hf["layer_types"])
