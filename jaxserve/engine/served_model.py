"""What settings name: a model's files, its config and its dtype, as they will be served. No weights are read."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxserve.checkpoint.huggingface import read_config
from jaxserve.checkpoint.model_files import ModelFiles, find_model
from jaxserve.config import DEMO_MODEL, EngineConfig
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import model_config


class ServedModel(NamedTuple):
    files: ModelFiles
    hf: dict[str, Any]  # config.json, with its architecture's defaults
    config: ModelConfig
    dtype: jnp.dtype


def served_model(config: EngineConfig, *, with_weights: bool) -> ServedModel:
    """The model that `config` names; weights are downloaded only `with_weights`. `InputError` if there is none."""
    files = find_model(
        config.model or str(DEMO_MODEL),
        revision=config.revision,
        hf_config_path=config.hf_config_path,
        with_weights=with_weights,
    )
    hf = read_config(files.config)
    return ServedModel(files, hf, _quantised(model_config(hf), config.quantization), serving_dtype(config.dtype, hf))


def serving_dtype(name: str, hf: dict[str, Any]) -> jnp.dtype:
    """The setting `dtype`, or what `auto` is for the checkpoint's config."""
    if name == "auto":
        stored = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        name = stored if stored in ("bfloat16", "float16", "float32") else "bfloat16"
    return jnp.dtype(name)


def _quantised(model: ModelConfig, quantization: str | None) -> ModelConfig:
    """The model with the setting `quantization`, which may repeat what its checkpoint has."""
    if quantization is None or quantization == model.quantization:
        return model
    if model.quantization is not None and model.packing is None:
        raise InputError(
            f"quantization={quantization!r} and the checkpoint's weights are {model.quantization} already; leave it out"
        )
    return dataclasses.replace(model, quantization=quantization)
