"""Published mixtures of experts build their parameters, as shapes only, on one to eight devices.

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
from jaxserve.models.moe import MoEConfig
from jaxserve.models.registry import ARCHITECTURES, model_config
from jaxserve.parallel.mesh import make_mesh, parameter_shardings
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.kv_cache import page_bytes

FAMILIES = {
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}  # the model_type of each architecture

_FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size intermediate_size".split()


def size(*numbers: int, **others: Any) -> dict[str, Any]:
    return dict(zip(_FIELDS, numbers, strict=True)) | others


_QWEN3 = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_V2_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_V2 = {
    "kv_lora_rank": 512,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": _V2_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
_V2_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}

# Architecture, config, billions of parameters as published, and numbers that a token takes in the cache of a layer.
SIZES: dict[str, tuple[str, dict[str, Any], float, int]] = {
    "Mixtral-8x7B": ("MixtralForCausalLM", size(4096, 32, 32, 8, 32000, 14336), 46.7, 2048),
    "Mixtral-8x22B": ("MixtralForCausalLM", size(6144, 56, 48, 8, 32768, 16384), 140.6, 2048),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        size(2048, 48, 32, 4, 151936, 6144, moe_intermediate_size=768, **_QWEN3),
        30.5,
        1024,
    ),
    "Qwen3-235B-A22B": (
        "Qwen3MoeForCausalLM",
        size(4096, 94, 64, 4, 151936, 12288, moe_intermediate_size=1536, **_QWEN3),
        235.1,
        1024,
    ),
    "gpt-oss-20b": ("GptOssForCausalLM", size(2880, 24, 64, 8, 201088, 2880, num_local_experts=32), 20.9, 1024),
    "gpt-oss-120b": ("GptOssForCausalLM", size(2880, 36, 64, 8, 201088, 2880), 116.8, 1024),
    "DeepSeek-V2-Lite": (
        "DeepseekV2ForCausalLM",
        size(2048, 27, 16, 16, 102400, 10944, moe_intermediate_size=1408, q_lora_rank=None, **_V2),
        15.7,
        576,
    ),
    "DeepSeek-V2": (
        "DeepseekV2ForCausalLM",
        size(5120, 60, 128, 128, 102400, 12288, moe_intermediate_size=1536, n_routed_experts=160, **_V2, **_V2_GROUPS),
        235.7,
        576,
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        size(7168, 61, 128, 128, 129280, 18432, scoring_func="sigmoid", topk_method="noaux_tc"),
        671.0,
        576,
    ),
}


@pytest.fixture(scope="module", params=SIZES)
def published(request: pytest.FixtureRequest) -> tuple[MoEConfig, float, int]:
    from transformers import CONFIG_MAPPING

    architecture, fields, *known = SIZES[request.param]
    hf = CONFIG_MAPPING[FAMILIES[architecture]](**copy.deepcopy(fields)).to_dict()
    return model_config(hf | {"architectures": [architecture]}), *known


def first_layers(config: MoEConfig, moe_layers: int) -> MoEConfig:
    """The model with its plain layers and so many with experts."""
    return dataclasses.replace(config, layer_kinds=config.layer_kinds[: len(config.dense_layers) + moe_layers])


def parameters(config: MoEConfig) -> nnx.State:
    return abstract_model(config, jnp.dtype(jnp.bfloat16))[1]


def test_parameters_and_cache_are_as_many_as_published(published: tuple[MoEConfig, float, int]) -> None:
    config, billions, cached_numbers = published
    one, two = (sum(p.size for p in jax.tree.leaves(parameters(first_layers(config, count)))) for count in (1, 2))
    assert one + (two - one) * (config.num_moe_layers - 1) == pytest.approx(billions * 1e9, rel=2e-3)
    layout = CacheLayout.of([None] * config.num_layers, page_size=1, max_step_tokens=1, max_model_len=1)
    assert page_bytes(config, layout, jnp.dtype(jnp.bfloat16)) == 2 * cached_numbers * config.num_layers


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_parameters_split_over_the_devices(published: tuple[MoEConfig, float, int], devices: int) -> None:
    state = parameters(first_layers(published[0], 1).over_tensor_axis(devices))
    shardings = jax.tree.leaves(parameter_shardings(make_mesh(devices), state))
    sizes = [p.size for p in jax.tree.leaves(state)]
    on_each = [math.prod(s.shard_shape(p.shape)) for p, s in zip(jax.tree.leaves(state), shardings, strict=True)]
    assert {part / whole for part, whole in zip(on_each, sizes, strict=True)} <= {1, 1 / devices}
    repeated = sum(whole for part, whole in zip(on_each, sizes, strict=True) if part == whole)
    assert repeated < 0.01 * sum(sizes) or devices == 1  # norms, routers, and what makes latents


def test_hidden_states_have_the_weights_dtype_and_logits_are_float32(published: tuple[MoEConfig, float, int]) -> None:
    config = first_layers(published[0], 1)
    graph, state = abstract_model(config, jnp.dtype(jnp.bfloat16))
    positions = jax.ShapeDtypeStruct((1, 7), jnp.int32)

    def forward(state: nnx.State, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        hidden = model(positions, positions, lambda layer, q, k, v, **variant: q[..., : v.shape[-1]])
        return hidden, model.logits(hidden)

    hidden, logits = jax.eval_shape(forward, state, positions)
    assert (hidden.shape, hidden.dtype) == ((1, 7, config.hidden_size), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((1, 7, config.vocab_size), jnp.float32)


def test_every_mixture_of_experts_is_in_the_table() -> None:
    served = {name for name, model in ARCHITECTURES.items() if "layers.{}.moe.down" in model.HF_NAMES}
    assert {architecture for architecture, *_ in SIZES.values()} == FAMILIES.keys() == served
