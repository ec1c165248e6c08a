"""Checkpoints in FP8 with a scale for every block: unpacked as they are read, in every part of a model."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint.fp8_blocks import unpacked
from jaxserve.errors import InputError
from tests.checkpoint.test_huggingface import WEIGHTS, change_config, change_weights
from tests.models import dense
from tests.models.cases import prompts, write_checkpoint

FP8 = ml_dtypes.float8_e4m3fn
BLOCK = (24, 40)  # which divides no size, so that the last blocks are cut off
LAYER = "model.layers.1.mlp.down_proj.weight"


def config(**changes: Any) -> dict[str, Any]:
    """As DeepSeek-V3's, and Qwen3's in FP8, have it."""
    given = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return {"quantization_config": given | changes}


def whole(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """By the definition, number by number."""
    return np.array(
        [
            [np.float32(number) * scales[i // BLOCK[0], j // BLOCK[1]] for j, number in enumerate(row)]
            for i, row in enumerate(numbers)
        ],
        np.float32,
    )


def write_blocks(case: str, directory: Path) -> tuple[Path, Path]:
    """A checkpoint whose projections are in blocks, and one with the same numbers in float32."""
    packed, plain = (write_checkpoint(case, directory / name) for name in ("packed", "plain"))
    random = np.random.default_rng(0)
    inside: dict[str, np.ndarray] = {}
    same: dict[str, np.ndarray] = {}
    for name, weight in load_file(plain / WEIGHTS).items():
        if not name.endswith("_proj.weight"):
            inside[name] = same[name] = weight
            continue
        scales = random.uniform(0.005, 0.015, [-(-size // own) for size, own in zip(weight.shape, BLOCK, strict=True)])
        scales = scales.astype(np.float32)
        spread = np.repeat(np.repeat(scales, BLOCK[0], 0), BLOCK[1], 1)[: weight.shape[0], : weight.shape[1]]
        inside |= {name: (weight / spread).astype(FP8), f"{name}_scale_inv": scales}
        same[name] = inside[name].astype(np.float32) * spread
    for path, tensors, changes in ((packed, inside, config()), (plain, same, {})):
        save_file(tensors, path / WEIGHTS)
        change_config(path, **changes)
    return packed, plain


@pytest.mark.parametrize(
    ("case", "devices"), [("qwen3-tied-group-8-head-64", 1), ("phi-3-window", 2), ("qwen3-moe", 2), ("deepseek-v3", 1)]
)
def test_it_gives_the_logits_of_its_numbers_in_float32(case: str, devices: int, tmp_path: Path) -> None:
    packed, plain = write_blocks(case, tmp_path)
    found, expected = dense.load(packed, devices), dense.load(plain, devices)
    prompt = prompts(case)[1]
    assert dense.relative_error(dense.logits(found, prompt), dense.logits(expected, prompt)) < 1e-5


def test_what_was_unpacked_is_rounded_where_that_is_wanted(tmp_path: Path) -> None:
    case = "qwen3-tied-group-8-head-64"
    packed, plain = write_blocks(case, tmp_path)
    found, expected = (dense.load(directory, quantization="int8") for directory in (packed, plain))
    prompt = prompts(case)[1]
    assert dense.relative_error(dense.logits(found, prompt), dense.logits(expected, prompt)) < 1e-5


@st.composite
def slices(draw: st.DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


@given(data=st.data(), blocks=st.integers(1, 3), rows=st.integers(1, 30), columns=st.integers(1, 90))
@settings(max_examples=50, deadline=None)
def test_any_part_is_unpacked_as_it_is_in_the_whole(data: st.DataObject, blocks: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(0)
    numbers = random.normal(size=(blocks * rows, columns)).astype(FP8)
    scales = random.normal(size=(-(-blocks * rows // BLOCK[0]), -(-columns // BLOCK[1]))).astype(np.float32)
    expected = whole(numbers, scales).reshape(blocks, rows, columns)
    part = tuple(data.draw(slices(size)) for size in expected.shape)
    found = unpacked(numbers, scales, BLOCK).reshape(-1, rows, columns)
    for lazy, wanted in ((found[part], expected[part]), (found[part[0]][:, part[1]], expected[part[:2]])):
        assert lazy.shape == wanted.shape
        np.testing.assert_array_equal(np.asarray(lazy), wanted)
    np.testing.assert_array_equal(np.asarray(list(found)[-1]), expected[-1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fmt": "e5m2"}, "fmt='e5m2'"),
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]"),
        ({"weight_block_size": [64, 128]}, r"'.*_scale_inv' has shape .* and for blocks of \[64, 128\]"),
    ],
)
def test_a_config_that_means_something_else_is_refused_by_its_field(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    packed, _ = write_blocks("llama-2", tmp_path)
    change_config(packed, **config(**changes))
    with pytest.raises(InputError, match=told):
        dense.load(packed)


def test_a_missing_scale_is_refused_by_name(tmp_path: Path) -> None:
    packed, _ = write_blocks("llama-2", tmp_path)
    change_weights(packed, **{f"{LAYER}_scale_inv": None})
    with pytest.raises(InputError, match=f"no tensor '{LAYER}_scale_inv'"):
        dense.load(packed)
