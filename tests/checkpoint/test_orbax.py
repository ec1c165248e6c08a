"""Orbax checkpoints: made from HuggingFace's and back, saved by a training script, restored onto any mesh."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.huggingface import read_config
from jaxserve.checkpoint.model_files import find_model
from jaxserve.checkpoint.safetensors_files import map_file, write_file
from jaxserve.cli.main import main
from jaxserve.errors import InputError
from jaxserve.models.registry import model_config
from jaxserve.parallel.mesh import make_mesh
from jaxserve.sampling_params import SamplingParams
from tests.checkpoint.test_huggingface import assert_same_state, change_config
from tests.models import dense
from tests.models.cases import prompts, write_checkpoint

CASE = "qwen3-tied-group-8-head-64"  # two KV heads
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("orbax") / "model")


@pytest.fixture(scope="module")
def converted(directory: Path) -> Path:
    convert(find_model(str(directory)), directory.with_name("converted"))
    return directory.with_name("converted")


@pytest.fixture(scope="module")
def training(directory: Path) -> Path:
    """What a training script saves: two steps of parameters, an optimizer's state and counts, and no config."""
    path = directory.with_name("training")
    _, params = dense.load(directory)
    older = jax.tree.map(jnp.zeros_like, params)
    with ocp.CheckpointManager(path) as manager:
        for step, state in ((9, older), (10, params)):
            saved = {"params": state, "optimizer": optax.adam(0.1).init(params), "step": step, "seconds": 1.5}
            manager.save(step, args=ocp.args.StandardSave(saved))
    return path


def load(model: Path, devices: int = 1, **options: Any) -> tuple[nnx.GraphDef, nnx.State]:
    files = find_model(str(model), **options)
    assert files.is_orbax
    return files.load_weights(model_config(read_config(files.config)), make_mesh(devices), jnp.dtype(jnp.float32))


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        load(model, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- from HuggingFace and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["qwen2-group-8-head-64", "llama-2", "qwen2.5-tied"])
def test_there_and_back_every_tensor_has_the_same_bytes(case: str, tmp_path: Path) -> None:
    first = write_checkpoint(case, tmp_path / "first", shards=2)
    tensors = {name: tensor for file in first.glob("*.safetensors") for name, tensor in map_file(file).items()}
    norms = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items() if "norm" in name}
    tensors |= norms  # a checkpoint of two dtypes
    for path in first.glob("*.safetensors*"):
        path.unlink()
    write_file(first / WEIGHTS, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.values())
    (first / "tokenizer.json").write_text("{}")

    assert main(["convert", str(first), str(tmp_path / "there")]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    found = map_file(tmp_path / "back" / WEIGHTS)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tobytes() == tensor.tobytes(), name
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / file).read_bytes() == (first / file).read_bytes()
        assert (tmp_path / "there" / file).read_bytes() == (first / file).read_bytes()


@pytest.mark.parametrize("devices", [1, 2, 8])  # the last repeats KV heads
def test_restored_onto_any_mesh_it_is_what_huggingface_gives_there(
    devices: int, directory: Path, converted: Path
) -> None:
    (_, expected), (_, found) = dense.load(directory, devices), load(converted, devices)
    assert_same_state(found, expected)
    assert jax.tree.map(lambda array: array.sharding, found) == jax.tree.map(lambda array: array.sharding, expected)


def test_an_engine_takes_it_as_it_takes_a_huggingface_directory(converted: Path, tiny_llm: Any) -> None:
    from jaxserve import LLM
    from tests.conftest import SMALL

    params = SamplingParams(temperature=0, max_tokens=8)
    batch = [{"prompt_token_ids": tokens} for tokens in prompts(CASE)]
    with LLM(str(converted), dtype="float32", skip_tokenizer_init=True, progress=False, **SMALL) as llm:
        found = llm.generate(batch, params)
    expected = tiny_llm().generate(batch, params)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]


# --- a training script's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [".", "10", "10/default"])
@pytest.mark.parametrize("devices", [1, 4])
def test_the_newest_step_of_a_training_run_is_restored(
    inside: str, devices: int, training: Path, directory: Path
) -> None:
    found = load(training / inside, devices, hf_config_path=str(directory))[1]
    assert_same_state(found, dense.load(directory, devices)[1])


def test_without_a_config_the_way_to_name_one_is_said(training: Path) -> None:
    assert "hf_config_path" in refusal(training)


def test_a_config_of_another_model_is_refused_by_the_parameter(training: Path, tmp_path: Path) -> None:
    def with_config(**fields: Any) -> str:
        path = write_checkpoint(CASE, tmp_path)
        return refusal(training, hf_config_path=str(change_config(path, **fields)))

    assert "embedding.weight" in with_config(vocab_size=900)
    assert "no parameter layers.2." in with_config(num_hidden_layers=3)
    assert "'layers.1." in with_config(num_hidden_layers=1)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_refused_by_its_path(converted: Path, tmp_path: Path) -> None:
    for number, pattern in enumerate(("orbax/_METADATA", "orbax/**/d/*")):
        path = shutil.copytree(converted, tmp_path / str(number))
        for file in path.glob(pattern):
            file.write_bytes(b"?")
        assert f"{path / 'orbax'} is damaged" in refusal(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # other arrays' futures
def test_a_truncated_checkpoint_is_refused_by_its_path_and_in_few_words(converted: Path, tmp_path: Path) -> None:
    path = shutil.copytree(converted, tmp_path / "model")
    largest = max(path.glob("orbax/**/d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    found = refusal(path)
    assert f"{path / 'orbax'} is damaged" in found
    assert "value of size 1000" in found
    assert len(found) < 600


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond 100 kB: writing fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # threads that Orbax leaves behind
@pytest.mark.parametrize("source", ["directory", "converted"])
def test_a_full_disk_leaves_nothing_half_written(
    source: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", str(request.getfixturevalue(source)), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "cannot write" in error[0]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_left_alone(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there already"):
        convert(find_model(str(directory)), tmp_path)
