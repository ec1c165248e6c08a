"""HuggingFace directories: read onto any mesh, written back, and refused in one sentence when something is wrong."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint.huggingface import save_weights
from jaxserve.checkpoint.safetensors_files import map_file
from jaxserve.errors import InputError
from jaxserve.models.registry import ARCHITECTURES
from tests.models import dense
from tests.models.cases import CASES, make_tensors, prompts, write_checkpoint

CASE = "qwen2-group-8-head-64"
WEIGHTS = "model.safetensors"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(CASE, tmp_path / "model")


def refusal(directory: Path, devices: int = 1) -> str:
    """The one sentence that loading `directory` is refused with."""
    with pytest.raises(InputError) as refused:
        dense.load(directory, devices)
    message = str(refused.value)
    assert "\n" not in message
    assert ". " not in message
    assert not message.endswith(".")
    return message


def change_config(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def change_weights(directory: Path, **tensors: np.ndarray | None) -> Path:
    """Replace or add `tensors`; None removes one."""
    kept = {name: np.array(tensor) for name, tensor in map_file(directory / WEIGHTS).items()}
    changed = kept | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, directory / WEIGHTS)
    return directory


# --- directories and files -------------------------------------------------------------------------------------------


def test_a_missing_directory_is_refused_by_name(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} " in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_directory_is_refused_by_name(directory: Path) -> None:
    assert f"{directory / WEIGHTS} " in refusal(directory / WEIGHTS)


def test_a_directory_without_config_is_refused(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


@pytest.mark.parametrize("content", [b'{"model_type": "llama",', b"\xff\xfe\x00", b"[]", b"{}"])
def test_a_damaged_config_is_refused_by_name(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    assert str(directory / "config.json") in refusal(directory)


def test_a_directory_without_weights_is_refused_and_told_the_names_looked_for(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    message = refusal(directory)
    assert "model.safetensors " in message
    assert "model.safetensors.index.json" in message


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_weights_file_is_refused_by_name(directory: Path, kept: int) -> None:
    path = directory / WEIGHTS
    os.truncate(path, kept % path.stat().st_size)
    assert f"{path} is damaged" in refusal(directory)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 7}'])
def test_a_damaged_index_is_refused_by_name(directory: Path, content: str) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in refusal(directory)


def test_an_index_that_names_an_absent_file_is_refused_by_the_file(tmp_path: Path) -> None:
    write_checkpoint(CASE, tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors, which is not there" in refusal(tmp_path)


def test_an_index_that_puts_a_tensor_in_the_wrong_file_is_refused_by_the_tensor(tmp_path: Path) -> None:
    index = write_checkpoint(CASE, tmp_path, shards=2) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = set(content["weight_map"].values())
    content["weight_map"]["model.norm.weight"] = (files - {content["weight_map"]["model.norm.weight"]}).pop()
    index.write_text(json.dumps(content))
    assert "'model.norm.weight'" in refusal(tmp_path)


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_refused_by_name(directory: Path) -> None:
    change_weights(directory, **{"model.layers.1.self_attn.k_proj.bias": None})
    assert "no tensor 'model.layers.1.self_attn.k_proj.bias'" in refusal(directory)


def test_a_surplus_tensor_is_refused_by_name(directory: Path) -> None:
    change_weights(directory, **{"model.layers.0.self_attn.o_proj.bias": np.zeros(72, np.float32)})
    assert "'model.layers.0.self_attn.o_proj.bias'" in refusal(directory)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", [517, 72]),
        ("model.layers.0.self_attn.k_proj.weight", [64, 72]),
        ("model.layers.0.mlp.up_proj.weight", [136, 72]),
        ("model.norm.weight", [72]),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(directory: Path, name: str, expected: list[int]) -> None:
    change_weights(directory, **{name: np.zeros((expected[0] + 1, *expected[1:]), np.float32)})
    message = refusal(directory)
    assert f"{name!r} has shape {[expected[0] + 1, *expected[1:]]}" in message
    assert f" {expected}" in message


def test_derived_and_repeated_tensors_are_ignored(tmp_path: Path) -> None:
    plain = dense.load(write_checkpoint("qwen2.5-tied", tmp_path))
    tied = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    derived = np.ones(32, np.float32)
    change_weights(tmp_path, **{"lm_head.weight": tied, "model.layers.0.self_attn.rotary_emb.inv_freq": derived})
    assert_same_state(dense.load(tmp_path)[1], plain[1])


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"architectures": ["BrandNewForCausalLM"], "model_type": "brand_new"}, "BrandNewForCausalLM"),
        ({"architectures": None}, "no architecture"),
    ],
)
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(
    directory: Path, fields: dict[str, Any], named: str
) -> None:
    message = refusal(change_config(directory, **fields))
    assert named in message
    assert all(supported in message for supported in ARCHITECTURES)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"rope_type": "sideways", "factor": 2.0}}, "'sideways'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mrope_section": [8, 12, 12]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window=None"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 63}, "head_dim"),
        ({"model_type": "brand_new"}, "brand_new"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_by_the_field(
    directory: Path, fields: dict[str, Any], named: str
) -> None:
    assert named in refusal(change_config(directory, **fields))


@pytest.mark.parametrize(
    ("case", "fields", "named"),
    [
        ("llama-2", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}, "layer_types"),
        ("mistral-window", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma-2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma-3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma-3", {"rope_scaling": {"rope_type": "sideways"}}, "'sideways'"),
        ("granite-3", {"mlp_bias": True}, "mlp_bias"),
        ("phi-4-partial-long-rope", {"partial_rotary_factor": 0.5}, "_factor"),
        ("glm-4", {"partial_rotary_factor": 0.3}, "partial_rotary_factor=0.3"),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_the_field(
    case: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_checkpoint(case, tmp_path)
    assert named in refusal(change_config(tmp_path, **fields))


@pytest.mark.parametrize("part", ["vision_config", "text_config", "audio_config"])
def test_models_with_more_than_text_are_refused_by_the_part(directory: Path, part: str) -> None:
    wrapper = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", part: {"hidden_size": 64}}
    assert f"Gemma3ForConditionalGeneration and has a {part}" in refusal(change_config(directory, **wrapper))
    wrapper["architectures"] = ["Gemma3ForCausalLM"]
    assert "Gemma3ForCausalLM and has a " in refusal(change_config(directory, **wrapper))


# --- writing ---------------------------------------------------------------------------------------------------------


def assert_same_state(found: nnx.State, expected: nnx.State) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"gpt-oss-mxfp4"}))  # which is saved unpacked
def test_saved_weights_are_the_tensors_that_were_loaded(case: str, tmp_path: Path) -> None:
    model = nnx.merge(*dense.load(write_checkpoint(case, tmp_path)))
    (tmp_path / WEIGHTS).unlink()
    save_weights(model, tmp_path, jnp.dtype(jnp.float32))
    saved, original = load_file(tmp_path / WEIGHTS), make_tensors(case, seed=0)
    assert saved.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(saved[name], original[name], err_msg=name)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("case", ["qwen2-group-8-head-64", "qwen3-tied-group-8-head-64"])  # one and two KV heads
def test_heads_repeated_on_a_mesh_are_written_once(case: str, devices: int, tmp_path: Path) -> None:
    model = nnx.merge(*dense.load(write_checkpoint(case, tmp_path), devices))
    save_weights(model, tmp_path, None)
    saved, original = load_file(tmp_path / WEIGHTS), make_tensors(case, seed=0)
    assert saved.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(saved[name], original[name], err_msg=name)


def test_weights_that_cannot_be_written_leave_what_was_there(directory: Path) -> None:
    model = nnx.merge(*dense.load(directory))
    before = (directory / WEIGHTS).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk does, it ends the writing half-way
    try:
        with pytest.raises(InputError, match=r"cannot write .*model\.safetensors"):
            save_weights(model, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", WEIGHTS]
    assert (directory / WEIGHTS).read_bytes() == before


def test_packed_weights_are_saved_unpacked_and_load_as_before(tmp_path: Path) -> None:
    graph, state = dense.load(write_checkpoint("gpt-oss-mxfp4", tmp_path))
    (tmp_path / WEIGHTS).unlink()
    save_weights(nnx.merge(graph, state), tmp_path, jnp.dtype(jnp.float32))
    assert load_file(tmp_path / WEIGHTS)["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 64, 192)
    assert_same_state(dense.load(tmp_path)[1], state)


def test_bfloat16_weights_come_back_rounded_once(directory: Path) -> None:
    graph, state = dense.load(directory)
    save_weights(nnx.merge(graph, state), directory)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(jnp.float32), state)
    assert_same_state(dense.load(directory)[1], rounded)


# --- meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("case", ["qwen2-group-8-head-64", "glm-4"])  # one and two KV heads
def test_a_model_split_over_devices_gives_the_logits_of_one(case: str, devices: int, tmp_path: Path) -> None:
    write_checkpoint(case, tmp_path)
    expected = dense.logits(dense.load(tmp_path), prompts(case)[-1])
    model = dense.load(tmp_path, devices)
    assert all(len(array.sharding.device_set) == devices for array in jax.tree.leaves(model[1]))
    assert dense.relative_error(dense.logits(model, prompts(case)[-1]), expected) < 1e-5


def test_each_device_holds_its_part_only(directory: Path) -> None:
    state = nnx.to_pure_dict(dense.load(directory, devices=4)[1])
    gate_up = state["layers"][0]["mlp"]["gate_up"]["weight"]
    assert {shard.data.shape for shard in gate_up.addressable_shards} == {(2 * 136 // 4, 72)}


@pytest.mark.parametrize(
    ("devices", "intermediate_size", "possible"),
    [
        (4, 136, "1, 2"),  # does not divide the 6 attention heads
        (3, 144, "1, 2"),  # does not divide the vocabulary, which is padded to 640
        (6, 136, "1, 2"),  # does not divide the MLP
    ],
)
def test_a_number_of_devices_that_does_not_split_the_model_is_refused_with_those_that_do(
    tmp_path: Path, devices: int, intermediate_size: int, possible: str
) -> None:
    write_checkpoint("llama-3-group-3-head-80", tmp_path)
    message = refusal(change_config(tmp_path, intermediate_size=intermediate_size), devices)
    assert f"tensor_parallel_size={devices} " in message
    assert message.endswith(f"possible sizes are {possible}")


def test_more_devices_than_there_are_is_refused(directory: Path) -> None:
    assert "JAX sees 8" in refusal(directory, devices=16)
