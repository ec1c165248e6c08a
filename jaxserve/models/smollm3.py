"""SmolLM3: Llama's decoder, every fourth layer without rotary embeddings."""

import dataclasses
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config
from jaxserve.models.llama import LlamaForCausalLM


class SmolLM3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config: ModelConfig = decoder_config(cls.__name__, hf, layer_types=hf["layer_types"])
        kinds = (
            kind if rotates else dataclasses.replace(kind, rope=None)
            for kind, rotates in zip(config.layer_kinds, hf["no_rope_layers"], strict=True)  # 1: with rope, 0: without
        )
        return dataclasses.replace(config, layer_kinds=tuple(kinds))
