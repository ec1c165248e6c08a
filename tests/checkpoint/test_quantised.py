"""Weights in few bits: made while a checkpoint is read, or read as other tools have made them, on any mesh."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxserve import LLM
from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.model_files import find_model
from jaxserve.errors import InputError
from jaxserve.layers.quantisation import KINDS
from pallas_kernels.xla.matmul import unpacked
from tests.checkpoint.test_huggingface import WEIGHTS, change_config, change_weights
from tests.conftest import SMALL
from tests.models import dense
from tests.models.cases import prompts, write_checkpoint

CASE = "qwen2.5-tied"  # one KV head, which more devices repeat
DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
TYPES = {"int8": ("int", "int-quantized"), "fp8": ("float", "float-quantized")}

# What checkpoints hold apart and fused, with biases, with norms elsewhere, in heads of odd sizes.
LAYOUTS = ["llama-2", "qwen3-group-3-head-128", CASE, "phi-3-window", "glm-4", "gemma-2", "olmo-2"]


def by_row(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The plain definition, row by row."""
    share = np.float32({"int8": 1 / 127, "fp8": 1 / 448}[kind])
    scale = np.array([max(abs(row.min()), abs(row.max())) * share or 1 for row in weight], np.float32)
    numbers = weight / scale[:, None]
    return (np.rint(numbers) if kind == "int8" else numbers).astype(DTYPES[kind]), scale


def by_group(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The plain definition of `int4`, group by group: numbers `[out, in]`, scales and zeros `[out, groups]`."""
    size = next((size for size in (128, 64, 32) if weight.shape[1] % size == 0), weight.shape[1])
    scales, zeros, numbers = [], [], []
    for group in weight.reshape(-1, size):
        least, most = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
        scales.append((most - least) * np.float32(1 / 15) or np.float32(1))
        zeros.append(np.rint(-least / scales[-1]) - 8)
        numbers.append(np.clip(np.rint(group / scales[-1]) + zeros[-1], -8, 7))
    groups = len(weight), -1
    return np.array(numbers).reshape(weight.shape), np.array(scales).reshape(groups), np.array(zeros).reshape(groups)


def meant(weight: np.ndarray, kind: str) -> np.ndarray:
    """What a weight is after it was rounded."""
    if kind != "int4":
        numbers, scale = by_row(weight, kind)
        return numbers.astype(np.float32) * scale[:, None]
    numbers, scales, zeros = by_group(weight)
    by_groups = numbers.reshape(*scales.shape, -1)
    return ((by_groups - zeros[..., None]) * scales[..., None]).reshape(weight.shape).astype(np.float32)


def by_tensor(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    whole, scale = by_row(weight.reshape(1, -1), kind)
    return whole.reshape(weight.shape), scale


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def change(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray | None]) -> Path:
    return change_weights(change_config(directory, **config), **tensors)


def compressed(kind: str, **changes: Any) -> dict[str, Any]:
    """A `config.json`'s part, as published checkpoints have it; `weights__field` changes what it says of weights."""
    kind_of_number, layout = TYPES[kind]
    numbers = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel",
        "symmetric": True,
        "type": kind_of_number,
    }
    of_weights = {name.removeprefix("weights__"): value for name, value in changes.items() if "__" in name}
    group = {
        "input_activations": numbers | {"dynamic": True, "strategy": "token"},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": numbers | of_weights,
    }
    whole = {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "frozen",
    }
    return {"quantization_config": whole | {name: value for name, value in changes.items() if "__" not in name}}


def write_quantised(case: str, kind: str, directory: Path, rounding: Any = by_row) -> tuple[Path, Path]:
    """A checkpoint in eight bits, and one with the same numbers in float32."""
    quantised, plain = (write_checkpoint(case, directory / name) for name in ("quantised", "plain"))
    inside: dict[str, Any] = {}
    same: dict[str, Any] = {}
    for name, weight in load_file(plain / WEIGHTS).items():
        if is_linear(name):
            numbers, scale = rounding(weight, kind)
            stored = scale[:, None] if len(scale) > 1 else scale
            inside |= {name: numbers, f"{name}_scale": stored.astype(ml_dtypes.bfloat16)}
            same[name] = numbers.astype(np.float32) * stored.astype(ml_dtypes.bfloat16).astype(np.float32)
    strategy = "channel" if rounding is by_row else "tensor"
    return change(quantised, compressed(kind, weights__strategy=strategy), inside), change(plain, {}, same)


def assert_equal_logits(case: str, found: Any, expected: Any) -> None:
    for prompt in prompts(case)[1:]:
        assert dense.relative_error(dense.logits(found, prompt), dense.logits(expected, prompt)) < 1e-4


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_rounded_while_they_are_read(kind: str, case: str, tmp_path: Path) -> None:
    plain = write_checkpoint(case, tmp_path)
    found = dense.load(plain, quantization=kind)
    rounded = {name: meant(weight, kind) for name, weight in load_file(plain / WEIGHTS).items() if is_linear(name)}
    assert_equal_logits(case, found, dense.load(change(plain, {}, rounded)))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_mesh_gets_the_same_numbers(kind: str, devices: int, tmp_path: Path) -> None:
    directory = write_checkpoint("qwen3-tied-group-8-head-64", tmp_path)
    graph, state = dense.load(directory, devices, quantization=kind)
    model = nnx.merge(graph, state)
    down = load_file(directory / WEIGHTS)["model.layers.1.mlp.down_proj.weight"]
    numbers, scale = by_row(down, kind)
    linear = model.layers[1].mlp.down  # its columns are split, and a row's scale depends on all of them
    np.testing.assert_array_equal(np.asarray(linear.weight[...]).view(np.uint8), numbers.view(np.uint8))
    np.testing.assert_array_equal(linear.scale[...], scale)
    prompt = prompts("qwen3-tied-group-8-head-64")[1]
    alone = dense.logits(dense.load(directory, quantization=kind), prompt)
    assert dense.relative_error(dense.logits((graph, state), prompt), alone) < 1e-5


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_mesh_gets_the_same_numbers_in_groups_of_which_a_device_has_whole_ones(
    devices: int, tmp_path: Path
) -> None:
    directory = write_checkpoint("qwen3-tied-group-8-head-64", tmp_path)
    graph, state = dense.load(directory, devices, quantization="int4")
    output = nnx.merge(graph, state).layers[1].attention.o
    weight = load_file(directory / WEIGHTS)["model.layers.1.self_attn.o_proj.weight"]
    numbers, scales, zeros = by_group(weight)
    halves = numbers.astype(np.int8).view(np.uint8) & 15
    np.testing.assert_array_equal(output.weight[...], halves[:, ::2] | halves[:, 1::2] << 4)
    repeats = output.scale.shape[1] // scales.shape[1]
    assert output.scale.shape[1] % devices == 0  # whatever the groups are
    np.testing.assert_array_equal(output.scale[...], np.repeat(scales, repeats, axis=1))
    np.testing.assert_array_equal(output.zero[...], np.repeat(zeros, repeats, axis=1))
    prompt = prompts("qwen3-tied-group-8-head-64")[1]
    alone = dense.logits(dense.load(directory, quantization="int4"), prompt)
    assert dense.relative_error(dense.logits((graph, state), prompt), alone) < 1e-5


@pytest.mark.parametrize(
    ("case", "kind", "rounding", "devices"),
    [
        ("llama-2", "int8", by_row, 1),
        (CASE, "int8", by_row, 2),
        (CASE, "fp8", by_row, 1),
        ("qwen3-group-3-head-128", "fp8", by_tensor, 1),
        ("phi-3-window", "int8", by_tensor, 2),
    ],
)
def test_a_quantised_checkpoint_is_served_with_its_own_numbers(
    case: str, kind: str, rounding: Any, devices: int, tmp_path: Path
) -> None:
    quantised, plain = write_quantised(case, kind, tmp_path, rounding)
    found = dense.load(quantised, devices)
    assert_equal_logits(case, found, dense.load(plain))
    assert {leaf.dtype for leaf in jax.tree.leaves(found[1])} == {np.dtype(np.float32), DTYPES[kind]}


def test_fp8_without_blocks_is_served(tmp_path: Path) -> None:
    quantised, plain = write_quantised("llama-2", "fp8", tmp_path, by_tensor)
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    scales = {
        f"model.layers.{layer}.self_attn.{part}_proj.input_scale": np.ones(1, np.float32)
        for layer in range(2)
        for part in "qkvo"
    }
    change(quantised, {"quantization_config": config}, scales)
    assert_equal_logits("llama-2", dense.load(quantised), dense.load(plain))


def test_the_setting_may_repeat_what_the_checkpoint_has_and_not_contradict_it(tmp_path: Path) -> None:
    quantised, _ = write_quantised(CASE, "int8", tmp_path)
    settings = {"skip_tokenizer_init": True, "progress": False, **SMALL}
    with LLM(str(quantised), quantization="int8", **settings) as llm:
        assert llm.engine.model_config.quantization == "int8"
    with pytest.raises(InputError, match="quantization='fp8' and the checkpoint's weights are int8 already"):
        LLM(str(quantised), quantization="fp8", **settings)


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]}, "modules_to_not_convert"),
        ({"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        ({"ignore": ["model.layers.0.mlp.down_proj"]}, "ignore="),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        ({"config_groups": {}}, "config_groups"),
        ({"weights__strategy": "group"}, "strategy='group'"),
        ({"weights__num_bits": 4}, "num_bits=4"),
        ({"weights__symmetric": False}, "symmetric=False"),
        ({"weights__type": "uint"}, "type='uint'"),
    ],
)
def test_what_is_not_built_is_refused_by_its_field(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    quantised, _ = write_quantised(CASE, "int8", tmp_path)
    change(quantised, compressed("int8", **changes), {})
    with pytest.raises(InputError, match=told) as refused:
        dense.load(quantised)
    assert "\n" not in str(refused.value)


LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({f"{LAYER}_scale": None}, f"no tensor '{LAYER}_scale'"),
        ({f"{LAYER}_scale": np.ones((3, 1), np.float32)}, rf"'{LAYER}_scale' has shape \[3\], .* it is \[128\]"),
        ({LAYER: np.ones((128, 208), np.float32)}, f"'{LAYER}' is float32 and by config.json int8"),
        ({LAYER: np.ones((128, 208), DTYPES["fp8"])}, f"'{LAYER}' is float8_e4m3fn and by config.json int8"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused_by_name(
    tensors: dict[str, Any], told: str, tmp_path: Path
) -> None:
    quantised, _ = write_quantised(CASE, "int8", tmp_path)
    with pytest.raises(InputError, match=told):
        dense.load(change(quantised, {}, tensors))


def test_a_nan_in_a_weight_that_is_rounded_is_warned_of_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = np.zeros((128, 208), np.float32)
    weight[5, 7] = np.nan
    directory = change(write_checkpoint(CASE, tmp_path), {}, {LAYER: weight})
    with caplog.at_level(logging.WARNING):
        dense.load(directory, quantization="int8")
    assert [LAYER in record.getMessage() for record in caplog.records] == [True]


def test_experts_are_refused_since_their_weights_would_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantization='int8' is for linear layers, .* Qwen3MoeForCausalLM"):
        dense.load(write_checkpoint("qwen3-moe", tmp_path), quantization="int8")


def test_a_quantised_checkpoint_is_not_converted(tmp_path: Path) -> None:
    quantised, _ = write_quantised(CASE, "int8", tmp_path)
    with pytest.raises(InputError, match=r"are quantised \(int8\), and those are not converted"):
        convert(find_model(str(quantised)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- from elsewhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "devices"), [("int8", 1), ("int8", 2), ("int4", 2)])
def test_an_orbax_checkpoint_is_rounded_as_its_tensors_in_safetensors_are(
    kind: str, devices: int, tmp_path: Path
) -> None:
    directory = write_checkpoint(CASE, tmp_path / "model")
    convert(find_model(str(directory)), tmp_path / "orbax")
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "progress": False, "dtype": "float32", **SMALL}
    states = []
    for model in (directory, tmp_path / "orbax"):
        with LLM(str(model), quantization=kind, tensor_parallel_size=devices, **settings) as llm:
            states.append(llm.state)
    for first, second in zip(*map(jax.tree.leaves, states), strict=True):
        assert first.sharding == second.sharding
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("kind", "devices"), [("int8", 1), ("int8", 2), ("int4", 2)])
def test_a_trainers_weights_are_rounded_on_their_way(kind: str, devices: int, tmp_path: Path) -> None:
    first, second = (write_checkpoint(CASE, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "progress": False, "dtype": "float32", **SMALL}
    with LLM(str(first), quantization=kind, tensor_parallel_size=devices, **settings) as llm:
        old = llm.state
        llm.update_weights(dense.load(second)[1])
        new = llm.state
        expected = dense.load(second, devices, quantization=kind)[1]
        for found, other in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(found, other)
        llm.update_weights(old)  # and what was in few bits comes back as it was
        assert all(a is b for a, b in zip(jax.tree.leaves(llm.state), jax.tree.leaves(old), strict=True))
        narrow = jax.tree.map(lambda array: array[..., :-1], dense.load(second)[1])
        with pytest.raises(InputError, match=r"has shape .* and the one served has"):
            llm.update_weights(narrow)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_in_few_bits_are_about_as_large_as_others(kind: str, tmp_path: Path) -> None:
    directory = write_checkpoint(CASE, tmp_path)
    with LLM(
        str(directory), load_format="dummy", quantization=kind, skip_tokenizer_init=True, progress=False, **SMALL
    ) as llm:
        linear = llm.state["layers"][1]["mlp"]["down"]
        parts = [linear[part][...] for part in ("weight", "scale", "zero") if linear.get(part)]
        if kind == "int4":
            weight = unpacked(*parts, jnp.float32)
        else:
            weight = parts[0].astype(jnp.float32) * parts[1][:, None]
        assert 0.018 < jnp.std(weight) < 0.022
        (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}])
        assert output.outputs[0].token_ids
