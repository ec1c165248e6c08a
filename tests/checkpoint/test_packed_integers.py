"""Checkpoints of GPTQ, AWQ and compressed-tensors in four and eight bits: served as they are, or unpacked."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint.safetensors_files import map_file
from jaxserve.errors import InputError
from tests.checkpoint.test_huggingface import WEIGHTS, change_config, change_weights
from tests.models import dense
from tests.models.cases import prompts, write_checkpoint

CASE = "qwen3-tied-group-8-head-64"
LAYER = "model.layers.1.mlp.down_proj"

# `quantization_config` as published checkpoints have it.
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
WEIGHTS_OF_FOUR_BITS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 8,
    "num_bits": 4,
    "observer": "minmax",
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}


def compressed(**changes: Any) -> dict[str, Any]:
    group = {"input_activations": None, "targets": ["Linear"], "weights": WEIGHTS_OF_FOUR_BITS | changes}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


CONFIGS = {
    "gptq": GPTQ,
    "gptq, eight bits, a scale a row": GPTQ | {"bits": 8, "group_size": -1},
    "gptq, columns out of order": GPTQ | {"desc_act": True},
    "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
    "awq": AWQ,
    "compressed-tensors": compressed(),
    "compressed-tensors with zeros": compressed(symmetric=False),
    "compressed-tensors, eight bits, a scale a row": compressed(num_bits=8, strategy="channel", group_size=None),
    "compressed-tensors, columns out of order": compressed(actorder="group"),
}


def word(numbers: list[int], bits: int) -> int:
    """The first in the lowest bits."""
    return sum(int(number) << bits * place for place, number in enumerate(numbers))


def packed(matrix: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 `[rows, columns / numbers in a word]`."""
    size = 32 // bits
    order = order or tuple(range(size))
    words = [
        [word([row[start + place] for place in order], bits) for start in range(0, len(row), size)] for row in matrix
    ]
    return np.array(words, np.uint32).view(np.int32)


def quantised(
    layer: str, shape: tuple[int, int], config: dict[str, Any], random: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random tensors for a weight `[out, in]` as a tool would write them, and the weight that they mean."""
    outputs, inputs = shape
    method = config["quant_method"]
    weights = config["config_groups"]["group_0"]["weights"] if method == "compressed-tensors" else config
    bits = weights.get("bits") or weights.get("num_bits")
    size = inputs if weights["group_size"] in (-1, None) else weights["group_size"]
    groups = inputs // size
    has_zeros = method == "awq" or weights.get("sym") is False or weights.get("symmetric") is False
    mixed = weights.get("desc_act") or weights.get("actorder") == "group"
    group_of = random.permutation(np.arange(inputs) // size) if mixed else np.arange(inputs) // size
    numbers = random.integers(0, 2**bits, (outputs, inputs))
    middle = np.full((outputs, groups), 2 ** (bits - 1))
    zeros = random.integers(1, 2**bits, (outputs, groups)) if has_zeros else middle
    scales = (random.uniform(1, 2, (outputs, groups)) / 2**bits / inputs**0.5).astype(np.float16)
    if method == "compressed-tensors":
        scales = scales.astype(ml_dtypes.bfloat16)
    meant = (numbers - zeros[:, group_of]) * scales.astype(np.float32)[:, group_of]
    if method == "gptq":
        stored_zeros = zeros - (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
        tensors = {
            "qweight": packed(numbers, bits).T,
            "qzeros": packed(stored_zeros.T, bits),
            "scales": scales.T,
            "g_idx": group_of.astype(np.int32),
            "bias": np.zeros(outputs, np.float16),
        }
    elif method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": packed(numbers.T, bits, order), "qzeros": packed(zeros.T, bits, order)}
        tensors |= {"scales": scales.T}
    else:
        tensors = {"weight_packed": packed(numbers, bits), "weight_scale": scales, "weight_shape": np.array(shape)}
        if has_zeros:
            tensors["weight_zero_point"] = packed(zeros.T, bits).T
        if mixed:
            tensors["weight_g_idx"] = group_of.astype(np.int32)
    whole = {f"{layer}.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return whole, meant.astype(np.float32)


def write(case: str, config: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """A packed checkpoint, and one with the weights that it means."""
    random = np.random.default_rng(0)
    paths = [write_checkpoint(case, directory / name) for name in ("packed", "plain")]
    inside: dict[str, np.ndarray] = {}
    same: dict[str, np.ndarray] = {}
    for name, weight in load_file(paths[1] / WEIGHTS).items():
        if name.endswith("_proj.weight"):
            tensors, same[name] = quantised(name.removesuffix(".weight"), weight.shape, config, random)
            inside |= {tensor: numbers for tensor, numbers in tensors.items() if tensor not in inside}
        else:
            same[name] = inside[name] = weight
    for path, tensors in zip(paths, (inside, same), strict=True):
        save_file(tensors, path / WEIGHTS)
    return change_config(paths[0], quantization_config=config), paths[1]


def assert_equal_logits(found: Any, expected: Any, case: str = CASE) -> None:
    prompt = prompts(case)[1]
    assert dense.relative_error(dense.logits(found, prompt), dense.logits(expected, prompt)) < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_packed_checkpoint_gives_the_logits_of_the_weights_that_it_means(
    config: dict[str, Any], tmp_path: Path
) -> None:
    directory, plain = write(CASE, config, tmp_path)
    assert_equal_logits(dense.load(directory), dense.load(plain))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (GPTQ, True),
        (CONFIGS["gptq_v2"], True),
        (GPTQ | {"group_size": -1}, True),
        (AWQ, True),
        (CONFIGS["compressed-tensors with zeros"], True),
        (compressed(actorder="weight"), True),
        (CONFIGS["gptq, columns out of order"], False),
        (CONFIGS["compressed-tensors, columns out of order"], False),
        (CONFIGS["gptq, eight bits, a scale a row"], False),
        (AWQ | {"modules_to_not_convert": ["mlp"]}, False),
        (compressed() | {"ignore": ["re:.*down_proj"]}, False),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, False),
    ],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_numbers_of_four_bits_in_groups_of_neighbours_stay_as_they_are(
    config: dict[str, Any], kept: bool, devices: int, tmp_path: Path
) -> None:
    directory, plain = write(CASE, config, tmp_path)
    graph, state = dense.load(directory, devices)
    for name in ("o", "qkv"):
        assert state["layers"][1]["attention"][name]["weight"][...].dtype == (np.uint8 if kept else np.float32)
    assert_equal_logits((graph, state), dense.load(plain, devices))


def test_experts_are_unpacked_with_everything_else(tmp_path: Path) -> None:
    directory, _ = write("qwen3-moe", AWQ, tmp_path)
    state = dense.load(directory)[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}


@pytest.mark.parametrize(
    ("case", "config", "devices"),
    [
        ("phi-3-window", "gptq", 2),  # fused in the checkpoint
        ("qwen2.5-tied", "gptq", 2),  # biases of its own, and one KV head for both devices
        ("qwen3-moe", "awq", 2),
        ("deepseek-v2-lite", "compressed-tensors", 1),
    ],
)
def test_every_part_of_a_model_and_every_mesh_gets_them(case: str, config: str, devices: int, tmp_path: Path) -> None:
    directory, plain = write(case, CONFIGS[config], tmp_path)
    if case == "qwen2.5-tied":  # the tools' own zeros took their place
        biases = {name: b for name, b in load_file(plain / WEIGHTS).items() if name.endswith("_proj.bias")}
        change_weights(directory, **biases)
    assert_equal_logits(dense.load(directory, devices), dense.load(plain, devices), case)


def test_they_are_rounded_to_eight_bits_where_that_is_wanted(tmp_path: Path) -> None:
    directory, plain = write(CASE, GPTQ, tmp_path)
    assert_equal_logits(*(dense.load(path, quantization="int8") for path in (directory, plain)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (GPTQ | {"bits": 3}, "bits=3"),
        (GPTQ | {"group_size": 0}, "group_size=0"),
        (GPTQ | {"group_size": None}, "group_size=None"),
        (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic="),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (compressed(num_bits=2), "num_bits=2"),
        (compressed(strategy="block"), "strategy='block'"),
        (GPTQ | {"group_size": 16}, "a layer has 72 inputs, .* whole groups of 16"),
        (GPTQ | {"group_size": 24, "desc_act": True}, r"the zeros of '.*' have shape .*, and by config.json"),
        (
            GPTQ | {"bits": 8},
            "the (numbers|zeros|scales) of '.*' have shape",
        ),
    ],
)
def test_a_config_that_is_not_built_or_means_others_is_refused(
    config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    directory, _ = write(CASE, GPTQ, tmp_path)
    change_config(directory, quantization_config=config)
    with pytest.raises(InputError, match=told) as refused:
        dense.load(directory)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({f"{LAYER}.scales": None}, rf"no tensor '{LAYER}.scales'"),
        ({f"{LAYER}.scales": np.ones((3, 3), np.float16)}, f"the .* of '{LAYER}' have shape"),
        ({f"{LAYER}.qweight": np.ones((3, 3), np.float32)}, f"the packed numbers of '{LAYER}' are float32"),
        ({f"{LAYER}.g_idx": np.ones(7, np.int32)}, rf"the groups of '{LAYER}' have shape \[7\]"),
        ({f"{LAYER}.g_idx": "too high"}, f"the groups of '{LAYER}' are from 99 to 99"),
        ({f"{LAYER}.g_idx": np.zeros(192, np.int32)}, f"the groups of '{LAYER}' are no neighbours"),
        (
            {f"{LAYER}.qweight": None, f"{LAYER}.weight": np.zeros((72, 192), np.float32)},
            f"tensor '{LAYER}.weight' is not packed",
        ),
        ({f"{LAYER}.bias": np.ones(72, np.float16)}, f"'{LAYER}.bias', first of 1"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused_by_name(
    tensors: dict[str, Any], told: str, tmp_path: Path
) -> None:
    directory, _ = write(CASE, GPTQ, tmp_path)
    for name, tensor in tensors.items():
        if isinstance(tensor, str):
            tensors = {name: np.full_like(map_file(directory / WEIGHTS)[name], 99)}
    change_weights(directory, **tensors)
    with pytest.raises(InputError, match=told):
        dense.load(directory)
