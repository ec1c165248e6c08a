"""Gemma 3, text: Gemma 2's layers with q/k norms in place of capped scores; sliding layers have a rope of their own."""

from typing import Any

from jaxserve.models.gemma2 import Gemma2ForCausalLM, GemmaConfig, gemma_config
from jaxserve.models.hf_config import require


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> GemmaConfig:
        require(cls.__name__, hf, attn_logit_softcapping=(None,))  # `transformers` reads it and does nothing with it
        return gemma_config(cls.__name__, hf, qk_norm=True)
