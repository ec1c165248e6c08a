"""Mixtures of experts whose config or tensors ask for what is not built are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import InputError
from tests.models import dense
from tests.models.cases import write_checkpoint


def refusal(directory: Path, devices: int = 1) -> str:
    with pytest.raises(InputError) as refused:
        dense.load(directory, devices)
    return str(refused.value)


@pytest.mark.parametrize(
    ("case", "fields", "named"),
    [
        ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act="),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok=6"),
        ("qwen3-moe", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3-moe", {"quantization_config": {"quant_method": "fp8"}}, "quantization='fp8'"),
        ("gpt-oss", {"attention_bias": False}, "attention_bias=False"),
        ("gpt-oss-mxfp4", {"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek-v2", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek-v2", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("deepseek-v2", {"topk_group": 4}, "topk_group"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek-v3", {"n_group": 5}, "n_group"),
        ("deepseek-v3", {"n_group": 12, "topk_group": 6}, "n_group=12"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ],
)
def test_a_config_is_refused_by_the_field(case: str, fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = write_checkpoint(case, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    message = refusal(tmp_path)
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("case", "name", "cut"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", (slice(1, None),)),
        ("gpt-oss", "model.layers.0.mlp.experts.down_proj", (slice(1, None),)),
        ("gpt-oss-mxfp4", "model.layers.0.mlp.experts.gate_up_proj_scales", (slice(None), slice(1, None))),
        ("deepseek-v2", "model.layers.2.self_attn.kv_b_proj.weight", (slice(1, None),)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(
    case: str, name: str, cut: tuple[slice, ...], tmp_path: Path
) -> None:
    path = write_checkpoint(case, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: np.ascontiguousarray(tensors[name][cut])}, path)
    message = refusal(tmp_path)
    assert f"{name!r}" in message
    assert "do not belong together" in message


def test_an_expert_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    path = write_checkpoint("qwen3-moe", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.8.up_proj.weight"]
    save_file(tensors, path)
    assert "'model.layers.1.mlp.experts.8.up_proj.weight'" in refusal(tmp_path)


def test_only_the_layers_that_predict_further_tokens_are_left_unread(tmp_path: Path) -> None:
    path = write_checkpoint("deepseek-v3", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.3.eh_proj.weight": np.zeros((72, 144), np.float32)}, path)
    dense.load(tmp_path)
    save_file(tensors | {"model.layers.4.eh_proj.weight": np.zeros((72, 144), np.float32)}, path)
    assert "'model.layers.4.eh_proj.weight'" in refusal(tmp_path)


def test_a_width_that_the_devices_cannot_share_is_refused_with_the_sizes_that_are_possible(tmp_path: Path) -> None:
    path = write_checkpoint("qwen3-moe", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_intermediate_size": 42}))
    message = refusal(tmp_path, devices=4)
    assert "expert width 42" in message
    assert message.endswith("possible sizes are 1, 2")
