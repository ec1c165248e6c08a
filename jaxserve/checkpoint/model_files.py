"""Where a model's weights, config and tokenizer are, and of which kind the weights are."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxserve.checkpoint import hub, huggingface, orbax
from jaxserve.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """What the settings `model`, `revision` and `hf_config_path` name."""

    name: str  # the directory, or the hub's id
    weights: Path  # a HuggingFace directory, or a tree that Orbax saved
    config: Path  # the directory of config.json, and of the tokenizer and generation_config.json where they are
    is_orbax: bool = False

    def load_weights(
        self,
        config: ModelConfig,
        mesh: Mesh,
        dtype: jnp.dtype | None,
        on_bytes: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[nnx.GraphDef, nnx.State]:
        """The model on `mesh`, as `huggingface.load_weights` explains."""
        load = orbax.load_weights if self.is_orbax else huggingface.load_weights
        return load(self.weights, config, mesh, dtype, on_bytes)


def find_model(
    model: str, *, revision: str | None = None, hf_config_path: str | None = None, with_weights: bool = True
) -> ModelFiles:
    """The files of a model directory, or of a model of HuggingFace's hub, downloaded if need be.

    A directory holds weights in safetensors, or an Orbax checkpoint. `hf_config_path` is the directory of config and
    tokenizer where they lie elsewhere, as they do for what a training script saves. Without `with_weights` none are
    downloaded.
    """
    directory, name = Path(model).expanduser(), model
    if not directory.exists() and hub.is_hub_id(model):
        directory = hub.download(model, revision, with_weights=with_weights)
    elif revision is not None:
        raise InputError(f"revision={revision!r} is of models on HuggingFace's hub, and {model} is none; leave it out")
    elif not directory.is_dir():
        raise InputError(
            f"there is no model directory {directory}; give the path of one, or a hub id such as Qwen/Qwen3-8B"
        )
    else:
        name = str(directory)
    config = Path(hf_config_path).expanduser() if hf_config_path is not None else directory
    if any((directory / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        return ModelFiles(name, directory, config)
    saved = orbax.find_orbax(directory)
    if saved is None:
        return ModelFiles(name, directory, config)
    if not (config / "config.json").exists():
        raise InputError(
            f"{config} has no config.json beside its Orbax checkpoint; name the directory that has the model's config "
            "and tokenizer with hf_config_path"
        )
    return ModelFiles(name, saved, config, is_orbax=True)
