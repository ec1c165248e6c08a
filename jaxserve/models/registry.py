"""Which model class serves which HuggingFace architecture."""

from typing import Any

from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from jaxserve.models.gpt_oss import GptOssForCausalLM
from jaxserve.models.llama import LlamaForCausalLM
from jaxserve.models.mixtral import MixtralForCausalLM
from jaxserve.models.qwen2 import Qwen2ForCausalLM
from jaxserve.models.qwen3 import Qwen3ForCausalLM
from jaxserve.models.qwen3_moe import Qwen3MoeForCausalLM

ARCHITECTURES: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "GptOssForCausalLM": GptOssForCausalLM,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
}


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The shape of the model that a HuggingFace config describes; `InputError` if its architecture is not built."""
    named = hf.get("architectures") or []
    for architecture in named:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture].config_from_hf(hf)
    given = ", ".join(named) or "no architecture"
    raise InputError(f"config.json names {given}; supported architectures are {', '.join(ARCHITECTURES)}")


def model_class(config: ModelConfig) -> type[Decoder]:
    return ARCHITECTURES[config.architecture]
