"""Where a model's weights, config and tokenizer are."""

import dataclasses
from pathlib import Path

from jaxserve.checkpoint import hub
from jaxserve.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """What the settings `model`, `revision` and `hf_config_path` name."""

    name: str  # the directory, or the hub's id
    weights: Path
    config: Path  # the directory of config.json, and of the tokenizer and generation_config.json where they are


def find_model(model: str, *, revision: str | None = None) -> ModelFiles:
    """The files of a model directory, or of a model of HuggingFace's hub, downloaded if need be."""
    directory = Path(model).expanduser()
    if not directory.exists() and hub.is_hub_id(model):
        directory = hub.download(model, revision)
        return ModelFiles(model, directory, directory)
    if revision is not None:
        raise InputError(
            f"revision={revision!r} is for models of HuggingFace's hub, and {model} is not one; leave it out"
        )
    if not directory.is_dir():
        raise InputError(
            f"there is no model directory {directory}; give the path of one, or a hub id such as Qwen/Qwen3-8B"
        )
    return ModelFiles(str(directory), directory, directory)
