"""OLMo 3: OLMo 2's layers, three in four with a window and a rope that is not stretched."""

from typing import Any

from jaxserve.models.hf_config import decoder_config
from jaxserve.models.olmo2 import Olmo2ForCausalLM, OlmoConfig


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> OlmoConfig:
        return decoder_config(cls.__name__, hf, of=OlmoConfig, layer_types=hf["layer_types"])
