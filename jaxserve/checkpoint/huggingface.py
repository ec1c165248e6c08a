"""HuggingFace model directories, read onto a mesh shard by shard and written back."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxserve.checkpoint.fusing import Source, overlaps
from jaxserve.checkpoint.placement import Plan, copy, place
from jaxserve.checkpoint.safetensors_files import SINGLE_FILE, SafetensorsDirectory, write_file
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import LlamaForCausalLM
from jaxserve.models.registry import ARCHITECTURES, model_class
from jaxserve.parallel.mesh import TENSOR, parameter_shardings

# Tensors that checkpoints carry and no model needs.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json`, with the defaults that `transformers` knows for its architecture filled in."""
    path = directory / "config.json"
    try:
        given = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{directory} has no config.json; give a HuggingFace model directory") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(given, dict) or "model_type" not in given:
        raise InputError(f"{path} names no model_type; give the config.json of a HuggingFace model")
    architectures = given.get("architectures")
    if not set(architectures or ()) & set(ARCHITECTURES):
        if "auto_map" in given:
            raise InputError(
                f"{path} wants code of its own to be run (auto_map), which never happens here; convert the checkpoint "
                f"to one of the supported architectures, {', '.join(ARCHITECTURES)}"
            )
        return given  # the registry refuses it by name
    from transformers import AutoConfig  # here, since its import takes seconds

    try:
        settings = {name: value for name, value in given.items() if name not in ("model_type", "auto_map")}
        return AutoConfig.for_model(given["model_type"], **settings).to_dict() | {"architectures": architectures}
    except Exception as error:  # its checks raise errors of many kinds, some of several lines
        reason = " ".join(str(*error.args[:1]).split()).split(". ")[0].rstrip(".")
        raise InputError(f"{path} does not describe a {given['model_type']} model ({reason}); correct it") from error


def abstract_model(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters as shapes only."""
    model = nnx.eval_shape(lambda: model_class(config)(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(model)


def load_weights(
    directory: Path,
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model of `directory` on `mesh`; each device's slices are read from the files and placed on it directly.

    Without a `dtype`, every parameter keeps its tensors' own. Raises `InputError` that names the file or the tensor
    with its expected and found shapes. `on_bytes` is told how many bytes of how many are in place.
    """
    graph, state = abstract_model(config, dtype or jnp.dtype(jnp.float32))
    stored = nnx.to_flat_state(state)
    if (on_mesh := config.over_tensor_axis(mesh.shape[TENSOR])) != config:
        graph, state = abstract_model(on_mesh, dtype or jnp.dtype(jnp.float32))
    targets = dict(nnx.to_flat_state(state))
    shardings = dict(nnx.to_flat_state(parameter_shardings(mesh, state)))
    files = SafetensorsDirectory(directory)
    used, plans = set(), []
    for path, variable in stored:
        names = _hf_names(model_class(config), path)
        used.update(names)
        tensors = [files.tensor(name) for name in names]
        sources = _sources(names, tensors, variable, targets[path])
        kind = dtype or np.result_type(*(tensor.dtype for tensor in tensors))
        plans.append(Plan(targets[path].shape, np.dtype(kind), shardings[path], sources))
    surplus = [name for name in files.names() if name not in used and not _DERIVED.search(name)]
    if config.tie_word_embeddings:
        surplus = [name for name in surplus if name != "lm_head.weight"]  # some writers repeat the tied table
    if surplus:
        raise InputError(
            f"{directory} holds {surplus[0]!r}, first of {len(surplus)} that {config.architecture} has no place for; "
            "its config.json and its weights do not belong together"
        )
    arrays = place(plans, on_bytes)
    return graph, nnx.from_flat_state(
        [(path, targets[path].replace(array)) for (path, _), array in zip(stored, arrays, strict=True)]
    )


def save_weights(model: LlamaForCausalLM, directory: Path, dtype: jnp.dtype | None = jnp.bfloat16) -> None:
    """Write `model`'s parameters to `directory`/model.safetensors under HuggingFace's names.

    Without a `dtype`, each keeps its own. KV heads that stand on a mesh several times are written once. `InputError`
    if the file cannot be written, and then there is none.
    """
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    stored = nnx.to_flat_state(abstract_model(model.config.stored, jnp.dtype(jnp.float32))[1])
    names = {path: _hf_names(type(model), path) for path, _ in stored}
    kinds = {path: np.dtype(dtype or parameters[path].dtype) for path, _ in stored}
    shapes = {
        name: (kinds[path], shape)
        for path, variable in stored
        for name, shape in zip(names[path], _stored_shapes(variable, len(names[path])), strict=True)
    }

    def tensors() -> Iterator[np.ndarray]:
        for path, variable in stored:
            fused = np.asarray(parameters[path][...])
            found = [np.empty(shapes[name][1], shapes[name][0]) for name in names[path]]
            sources = _sources(names[path], found, variable, parameters[path])
            for _, part, rows in overlaps(sources, fused.shape, (slice(None),) * fused.ndim, fused):
                copy(rows, part)
            yield from found

    write_file(directory / SINGLE_FILE, shapes, tensors())


def _hf_names(model: type[LlamaForCausalLM], path: tuple) -> list[str]:
    """The checkpoint's names for the parameter at `path`, such as `("layers", 3, "mlp", "down", "weight")`."""
    *module, leaf = path
    numbers = [str(step) for step in module if isinstance(step, int)]
    pattern = ".".join("{}" if isinstance(step, int) else step for step in module)
    return [f"{name.format(*numbers)}.{leaf}" for name in model.HF_NAMES[pattern]]


def _stored_shapes(stored: nnx.Variable, count: int) -> list[tuple[int, ...]]:
    """The shapes of the `count` tensors that make up a parameter; one alone has all parts, one after the other."""
    parts = stored.get_metadata()["parts"]
    blocks = stored.shape[0] // sum(parts) if len(parts) > 1 else 1
    rows = [blocks * part for part in parts]
    return [(height, *stored.shape[1:]) for height in ([sum(rows)] if count == 1 else rows)]


def _sources(names: list[str], tensors: list[np.ndarray], stored: nnx.Variable, target: nnx.Variable) -> list[Source]:
    """The tensors as the parts of `target`, after a check of their shapes against `stored`, the parameter unrepeated.

    One tensor for several parts has them fused already, one after the other.
    """
    for name, tensor, expected in zip(names, tensors, _stored_shapes(stored, len(names)), strict=True):
        if tensor.shape != expected:
            raise InputError(
                f"tensor {name!r} has shape {list(tensor.shape)}, and by config.json it is {list(expected)}; "
                "they do not belong together"
            )
    parts = target.get_metadata()["parts"]
    if len(names) < len(parts):
        own = stored.get_metadata()["parts"]
        rows = [len(tensors[0]) * part // sum(own) for part in own]
        names, tensors = names * len(parts), np.split(tensors[0], np.cumsum(rows)[:-1])
    return [Source(*source) for source in zip(names, tensors, parts, strict=True)]
