"""`jaxserve plan`: the engine's own arithmetic, for GPUs that are not there."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from jaxserve.checkpoint.huggingface import read_config
from jaxserve.cli.main import main
from jaxserve.cli.plan import GPUS, Fit, fit_on
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import model_config
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.memory import plan_pages
from scripts.gpu.engine import QWEN3_8B

BF16 = jnp.dtype(jnp.bfloat16)
LAYERS = 36
PARAMETERS = 8_190_735_360  # as the model's card has it
IN_LINEAR_LAYERS = LAYERS * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12_288)
OUTPUTS = LAYERS * (6144 + 4096 + 2 * 12_288 + 4096)
PAGE = 64 * LAYERS * 2 * 8 * 128 * 2  # positions, layers, keys and values, heads, numbers, bytes


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("Qwen3-8B")
    (directory / "config.json").write_text(json.dumps(QWEN3_8B))
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelConfig:
    return model_config(read_config(directory))


def fit(model: ModelConfig, gpu: str, devices: int = 1, length: int = 8192, **settings: Any) -> Fit | None:
    return fit_on(GPUS[gpu], devices, model, BF16, EngineConfig(**settings), length)


def test_weights_are_those_of_the_models_card(model: ModelConfig) -> None:
    whole, quarter = fit(model, "H100"), fit(model, "H100", 4)
    assert whole is not None
    assert quarter is not None
    assert whole.weight_bytes == 2 * PARAMETERS
    assert quarter.weight_bytes == pytest.approx(whole.weight_bytes / 4, rel=0.001)  # norms are on each
    read = 2 * (PARAMETERS - 151_936 * 4096)  # of the embedding a step reads single rows
    assert whole.seconds == pytest.approx(read / 3350e9)


def test_eight_bits_take_half_of_the_linear_layers_and_a_scale_an_output(model: ModelConfig) -> None:
    plain, small = fit(model, "H100"), fit(dataclasses.replace(model, quantization="int8"), "H100")
    assert plain is not None
    assert small is not None
    assert plain.weight_bytes - small.weight_bytes == IN_LINEAR_LAYERS - 4 * OUTPUTS


def test_four_bits_take_a_quarter_and_a_scale_and_a_zero_for_every_128(model: ModelConfig) -> None:
    plain, small = fit(model, "H100"), fit(dataclasses.replace(model, quantization="int4"), "H100")
    assert plain is not None
    assert small is not None
    numbers = IN_LINEAR_LAYERS
    assert plain.weight_bytes - small.weight_bytes == 2 * numbers - numbers // 2 - 5 * numbers // 128


@pytest.mark.parametrize(("gpu", "devices"), [("L40S", 1), ("H100", 2), ("H200", 8)])
def test_pages_are_as_many_as_the_engine_finds_room_for(gpu: str, devices: int, model: ModelConfig) -> None:
    found = fit(model, gpu, devices)
    assert found is not None
    reserved = int(GPUS[gpu].mib * 2**20 * 0.9)
    there = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": reserved, "bytes_in_use": 0})
    layout = CacheLayout.of([None], page_size=64, max_step_tokens=4096, max_model_len=40_960)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
        pages = plan_pages(
            page_bytes=PAGE,
            wanted=256 * layout.pages_of(40_960),
            device=cast(jax.Device, there),
            devices=devices,
            utilization=0.9,
            weight_bytes=found.weight_bytes * devices,
            working_bytes=4096 * (4 * 4096 + 3 * 12_288) * 6 + 6 * 256 * 151_936 * 4 + 256 * 151_936 * 9,
        )
    assert found.page_bytes * devices // PAGE == pytest.approx(pages, abs=1)
    assert found.requests == min(256, pages // 128)
    assert found.longest == 40_960


def test_what_does_not_fit_or_split_is_none(model: ModelConfig) -> None:
    assert fit(model, "L4", length=32_768) is None  # its pages hold fewer tokens
    assert fit(model, "L4", 2, length=32_768) is not None
    assert fit(model, "H100", 3) is None
    assert fit(dataclasses.replace(model, intermediate_size=40 * model.intermediate_size), "L4", 8) is None


def test_sequences_that_run_at_a_time_are_the_settings(model: ModelConfig) -> None:
    found = fit(model, "B200", 8, length=64)
    assert found is not None
    assert found.requests == 256
    more = fit(model, "B200", 8, length=64, max_num_seqs=1024)
    assert more is not None
    assert more.requests == 1024


def test_the_command_shows_the_smallest_of_each_and_writes_all_numbers(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "plan.json"
    words = ["plan", "--model", str(directory), "--length", "32768", "--output-json", str(report)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"{count} x {gpu} " in shown for count, gpu in ((2, "L4"), (2, "RTX4090"), (1, "H100"), (1, "B200")))
    assert max(map(len, shown.splitlines()[:12])) <= 80
    assert main([*words, "--gpu", "H100", "H200"]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [(row["gpu"], row["devices"]) for row in rows] == [
        (gpu, n) for gpu in ("H100", "H200") for n in (1, 2, 4, 8)
    ]
    assert rows[0]["weight_bytes"] == 2 * PARAMETERS


def test_an_unknown_gpu_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "H10"]) == 2
    assert "there is no GPU 'H10' in the list; did you mean 'H100'?" in capsys.readouterr().err
