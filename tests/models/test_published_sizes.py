"""The sizes that people serve: each builds its parameters, as shapes only, on one to eight devices.

Numbers are those of the models' own config.json; whatever is left out is their family's default in `transformers`.
"""

import copy
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import ARCHITECTURES, model_config
from jaxserve.parallel.mesh import make_mesh, parameter_shardings
from tests.models.test_moe_sizes import FAMILIES as MOE_FAMILIES

DEVICES = (1, 2, 4, 8)


_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)


def size(*numbers: int, **others: Any) -> dict[str, Any]:
    return dict(zip(_FIELDS, numbers, strict=True)) | others


_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
_LONG = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": _LONGROPE}

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
    "Glm4ForCausalLM": "glm4",
}  # the model_type of each architecture

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": {
        "Llama-2-7B": size(4096, 11008, 32, 32, 32, 32000),
        "Llama-2-13B": size(5120, 13824, 40, 40, 40, 32000),
        "Llama-2-70B": size(8192, 28672, 80, 64, 8, 32000),
        "Llama-3.1-8B": size(4096, 14336, 32, 32, 8, 128256),
        "Llama-3.1-405B": size(16384, 53248, 126, 128, 8, 128256),
        "Llama-3.2-1B": size(2048, 8192, 16, 32, 8, 128256, head_dim=64),
        "Llama-3.2-3B": size(3072, 8192, 28, 24, 8, 128256, head_dim=128),
        "TinyLlama-1.1B": size(2048, 5632, 22, 32, 4, 32000),
        "SmolLM2-135M": size(576, 1536, 30, 9, 3, 49152),
        "SmolLM2-360M": size(960, 2560, 32, 15, 5, 49152),
        "SmolLM2-1.7B": size(2048, 8192, 24, 32, 32, 49152),
    },
    "Qwen2ForCausalLM": {
        "Qwen2.5-0.5B": size(896, 4864, 24, 14, 2, 151936),
        "Qwen2.5-1.5B": size(1536, 8960, 28, 12, 2, 151936),
        "Qwen2.5-3B": size(2048, 11008, 36, 16, 2, 151936),
        "Qwen2.5-7B": size(3584, 18944, 28, 28, 4, 152064),
        "Qwen2.5-14B": size(5120, 13824, 48, 40, 8, 152064),
        "Qwen2.5-32B": size(5120, 27648, 64, 40, 8, 152064),
        "Qwen2.5-72B": size(8192, 29568, 80, 64, 8, 152064),
    },
    "Qwen3ForCausalLM": {
        "Qwen3-0.6B": size(1024, 3072, 28, 16, 8, 151936, head_dim=128),
        "Qwen3-1.7B": size(2048, 6144, 28, 16, 8, 151936, head_dim=128),
        "Qwen3-4B": size(2560, 9728, 36, 32, 8, 151936, head_dim=128),
        "Qwen3-8B": size(4096, 12288, 36, 32, 8, 151936, head_dim=128),
        "Qwen3-14B": size(5120, 17408, 40, 40, 8, 151936, head_dim=128),
        "Qwen3-32B": size(5120, 25600, 64, 64, 8, 151936, head_dim=128),
    },
    "MistralForCausalLM": {
        "Mistral-7B-v0.1": size(4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
        "Mistral-7B-v0.3": size(4096, 14336, 32, 32, 8, 32768, sliding_window=None),
        "Ministral-8B-2410": size(4096, 12288, 36, 32, 8, 131072, head_dim=128, sliding_window=32768),
        "Mistral-Nemo-12B": size(5120, 14336, 40, 32, 8, 131072, head_dim=128, sliding_window=None),
        "Mistral-Small-24B": size(5120, 32768, 40, 32, 8, 131072, head_dim=128, sliding_window=None),
        "Mistral-Large-123B": size(12288, 28672, 88, 96, 8, 32768, head_dim=128, sliding_window=None),
    },
    "MinistralForCausalLM": {},
    "Gemma2ForCausalLM": {
        "Gemma-2-2B": size(2304, 9216, 26, 8, 4, 256000, head_dim=256),
        "Gemma-2-9B": size(3584, 14336, 42, 16, 8, 256000, head_dim=256),
        "Gemma-2-27B": size(4608, 36864, 46, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144),
    },
    "Gemma3ForCausalLM": {
        "Gemma-3-270M": size(640, 2048, 18, 4, 1, 262144, head_dim=256, sliding_window=512),
        "Gemma-3-1B": size(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512),
        "Gemma-3-4B": size(2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024),
        "Gemma-3-12B": size(3840, 15360, 48, 16, 8, 262208, head_dim=256, sliding_window=1024),
        "Gemma-3-27B": size(5376, 21504, 62, 32, 16, 262208, head_dim=128, query_pre_attn_scalar=168),
    },
    "Phi3ForCausalLM": {
        "Phi-3-mini-4k": size(3072, 8192, 32, 32, 32, 32064, sliding_window=2047),
        "Phi-3.5-mini": size(3072, 8192, 32, 32, 32, 32064, **_LONG),
        "Phi-3-medium": size(5120, 17920, 40, 40, 10, 32064, sliding_window=2047),
        "Phi-4": size(5120, 17920, 40, 40, 10, 100352, max_position_embeddings=16384),
        "Phi-4-mini": size(3072, 8192, 32, 24, 8, 200064, partial_rotary_factor=0.75, **_LONG),
    },
    "Olmo2ForCausalLM": {
        "OLMo-2-1B": size(2048, 8192, 16, 16, 16, 100352),
        "OLMo-2-7B": size(4096, 11008, 32, 32, 32, 100352),
        "OLMo-2-13B": size(5120, 13824, 40, 40, 40, 100352),
        "OLMo-2-32B": size(5120, 27648, 64, 40, 8, 100352),
    },
    "Olmo3ForCausalLM": {
        "Olmo-3-7B": size(4096, 11008, 32, 32, 32, 100278),
        "Olmo-3-32B": size(5120, 27648, 64, 40, 8, 100278),
    },
    "GraniteForCausalLM": {
        "Granite-3.3-2B": size(2048, 8192, 40, 32, 8, 49159, tie_word_embeddings=True),
        "Granite-3.3-8B": size(4096, 12800, 40, 32, 8, 49159, tie_word_embeddings=True),
    },
    "SmolLM3ForCausalLM": {"SmolLM3-3B": size(2048, 11008, 36, 16, 4, 128256)},
    "Glm4ForCausalLM": {
        "GLM-4-9B-0414": size(4096, 13696, 40, 32, 2, 151552, head_dim=128),
        "GLM-4-32B-0414": size(6144, 23040, 61, 48, 2, 151552, head_dim=128, attention_bias=False),
    },
}

# What does not split: the attention heads do not divide evenly.
REFUSED = {
    "SmolLM2-135M": (2, 4, 8),
    "SmolLM2-360M": (2, 4, 8),
    "Qwen2.5-0.5B": (4, 8),
    "Qwen2.5-1.5B": (8,),
    "Qwen2.5-7B": (8,),
    "Gemma-3-270M": (8,),
    "Gemma-3-1B": (8,),
}

MODELS = [(architecture, name) for architecture, sizes in SIZES.items() for name in ("default", *sizes)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(model))
def published(request: pytest.FixtureRequest) -> tuple[str, ModelConfig]:
    from transformers import CONFIG_MAPPING

    architecture, name = request.param
    fields = copy.deepcopy(SIZES[architecture].get(name, {}))  # transformers writes into them
    hf = CONFIG_MAPPING[FAMILIES[architecture]](**fields).to_dict()
    return name, model_config(hf | {"architectures": [architecture]})


def test_every_architecture_is_in_the_table() -> None:
    assert FAMILIES.keys() == SIZES.keys() == ARCHITECTURES.keys() - MOE_FAMILIES.keys()


@pytest.mark.parametrize("devices", DEVICES)
def test_parameters_split_over_the_devices(published: tuple[str, ModelConfig], devices: int) -> None:
    name, config = published
    config = dataclasses.replace(config, layer_kinds=tuple(dict.fromkeys(config.layer_kinds)))  # one layer of each kind
    if devices in REFUSED.get(name, ()):
        with pytest.raises(InputError, match=f"tensor_parallel_size={devices} does not split"):
            config.over_tensor_axis(devices)
        return
    _, state = abstract_model(config.over_tensor_axis(devices), jnp.dtype(jnp.bfloat16))
    shardings = jax.tree.leaves(parameter_shardings(make_mesh(devices), state))
    parameters = jax.tree.leaves(state)
    on_each = [math.prod(where.shard_shape(p.shape)) for p, where in zip(parameters, shardings, strict=True)]
    repeated = sum(p.size for p, part in zip(parameters, on_each, strict=True) if part == p.size)
    assert sum(on_each) == repeated + (sum(p.size for p in parameters) - repeated) / devices
    assert repeated < 1e6 or devices == 1  # norms only


@pytest.mark.parametrize("architecture", FAMILIES)
def test_hidden_states_have_the_weights_dtype_and_logits_are_float32(architecture: str) -> None:
    from transformers import CONFIG_MAPPING

    config = model_config(CONFIG_MAPPING[FAMILIES[architecture]]().to_dict() | {"architectures": [architecture]})
    graph, state = abstract_model(config, jnp.dtype(jnp.bfloat16))
    positions = jax.ShapeDtypeStruct((1, 7), jnp.int32)

    def forward(state: nnx.State, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        hidden = model(positions, positions, lambda layer, q, k, v, **variant: q)
        return hidden, model.logits(hidden)

    hidden, logits = jax.eval_shape(forward, state, positions)
    assert (hidden.shape, hidden.dtype) == ((1, 7, config.hidden_size), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((1, 7, config.vocab_size), jnp.float32)
