"""Which model class serves which HuggingFace architecture."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import InputError
from jaxserve.layers.linear import Linear
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from jaxserve.models.gemma2 import Gemma2ForCausalLM
from jaxserve.models.gemma3 import Gemma3ForCausalLM
from jaxserve.models.glm4 import Glm4ForCausalLM
from jaxserve.models.gpt_oss import GptOssForCausalLM
from jaxserve.models.granite import GraniteForCausalLM
from jaxserve.models.llama import LlamaForCausalLM
from jaxserve.models.ministral import MinistralForCausalLM
from jaxserve.models.mistral import MistralForCausalLM
from jaxserve.models.mixtral import MixtralForCausalLM
from jaxserve.models.olmo2 import Olmo2ForCausalLM
from jaxserve.models.olmo3 import Olmo3ForCausalLM
from jaxserve.models.phi3 import Phi3ForCausalLM
from jaxserve.models.qwen2 import Qwen2ForCausalLM
from jaxserve.models.qwen3 import Qwen3ForCausalLM
from jaxserve.models.qwen3_moe import Qwen3MoeForCausalLM
from jaxserve.models.smollm3 import SmolLM3ForCausalLM

ARCHITECTURES: dict[str, type[Decoder]] = {
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "Glm4ForCausalLM": Glm4ForCausalLM,
    "GraniteForCausalLM": GraniteForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MinistralForCausalLM": MinistralForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
    "Olmo3ForCausalLM": Olmo3ForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "GptOssForCausalLM": GptOssForCausalLM,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    "SmolLM3ForCausalLM": SmolLM3ForCausalLM,
}


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The shape of the model that a HuggingFace config describes; `InputError` if its architecture is not built."""
    named = hf.get("architectures") or []
    for part in ("vision_config", "audio_config", "text_config"):
        if hf.get(part):
            raise InputError(
                f"config.json names {', '.join(named)} and has a {part}: text models are served here, and none with "
                "other parts; give a checkpoint of the language model alone"
            )
    for architecture in named:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture].config_from_hf(hf)
    given = ", ".join(named) or "no architecture"
    raise InputError(f"config.json names {given}; supported architectures are {', '.join(ARCHITECTURES)}")


def make_model(config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Decoder:
    """The model with random weights, as `config` says in which numbers."""
    model = model_class(config)(config, dtype=dtype, rngs=rngs)
    if config.quantization is not None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Linear):
                group = config.stored_group(module.in_features)
                module.quantise(config.quantization, group=group, devices=config.tensor_devices)
    return model


def model_class(config: ModelConfig) -> type[Decoder]:
    return ARCHITECTURES[config.architecture]
