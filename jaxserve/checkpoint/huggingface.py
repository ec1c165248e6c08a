"""HuggingFace model directories, read onto a mesh shard by shard and written back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxserve.checkpoint.safetensors_files import SINGLE_FILE, SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
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
        return given  # the registry refuses it by name
    from transformers import AutoConfig  # here, since its import takes seconds

    try:
        settings = {name: value for name, value in given.items() if name != "model_type"}
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
    dtype: jnp.dtype,
    on_parameter: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model of `directory` on `mesh`; each device's slices are read from the files and placed on it directly.

    Raises `InputError` that names the file or the tensor with its expected and found shapes. `on_parameter` is told
    how many parameters of how many are in place.
    """
    stored = nnx.to_flat_state(abstract_model(config, dtype)[1])
    graph, state = abstract_model(config.over_tensor_axis(mesh.shape[TENSOR]), dtype)
    placed = dict(nnx.to_flat_state(state))
    shardings = dict(nnx.to_flat_state(parameter_shardings(mesh, state)))
    loaded, used = [], set()
    with SafetensorsDirectory(directory) as files:
        for path, variable in stored:
            names = _hf_names(model_class(config), path)
            used.update(names)
            target = placed[path]
            sources = _sources(names, [files.tensor(name) for name in names], variable, target)
            array = jax.make_array_from_callback(target.shape, shardings[path], _fuse(sources, target.shape, dtype))
            loaded.append((path, target.replace(array)))
            on_parameter(len(loaded), len(stored))
        surplus = [name for name in files.names() if name not in used and not _DERIVED.search(name)]
    if config.tie_word_embeddings:
        surplus = [name for name in surplus if name != "lm_head.weight"]  # some writers repeat the tied table
    if surplus:
        raise InputError(
            f"{directory} holds {surplus[0]!r}, first of {len(surplus)} that {config.architecture} has no place for; "
            "its config.json and its weights do not belong together"
        )
    return graph, nnx.from_flat_state(loaded)


def save_weights(model: Decoder, directory: Path, dtype: jnp.dtype = jnp.bfloat16) -> None:
    """Write `model`'s parameters to `directory`/model.safetensors under HuggingFace's names."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parts = variable.get_metadata()["parts"]
        names = _hf_names(type(model), path)
        rows = np.asarray(variable[...].astype(dtype))
        if len(parts) == 1:
            tensors[names[0]] = rows[: parts[0]]
            continue
        blocks = rows.reshape(-1, sum(parts), *rows.shape[1:])
        pieces = [part.reshape(-1, *rows.shape[1:]) for part in np.split(blocks, np.cumsum(parts)[:-1], axis=1)]
        tensors |= dict(zip(names, pieces if len(names) > 1 else [np.concatenate(pieces)], strict=True))
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        directory / SINGLE_FILE,
        {"format": "pt"},
    )


def _hf_names(model: type[Decoder], path: tuple) -> list[str]:
    """The checkpoint's names for the parameter at `path`, such as `("layers", 3, "mlp", "down", "weight")`."""
    *module, leaf = path
    numbers = [str(step) for step in module if isinstance(step, int)]
    pattern = ".".join("{}" if isinstance(step, int) else step for step in module)
    return [f"{name.format(*numbers)}.{leaf}" for name in model.HF_NAMES[pattern]]


def _sources(names: list[str], tensors: list[Any], stored: nnx.Variable, target: nnx.Variable) -> list["_Source"]:
    """The tensors as the parts of `target`, after a check of their shapes against `stored`, the parameter unrepeated.

    One tensor for several parts has them fused already, one after the other.
    """
    parts = stored.get_metadata()["parts"]
    blocks = stored.shape[0] // sum(parts) if len(parts) > 1 else 1
    rows = [blocks * part for part in parts]
    for name, tensor, height in zip(names, tensors, [sum(rows)] if len(names) == 1 else rows, strict=True):
        found, expected = list(tensor.get_shape()), [height, *stored.shape[1:]]
        if found != expected:
            raise InputError(
                f"tensor {name!r} has shape {found}, and by config.json it is {expected}; they do not belong together"
            )
    starts = [0] * len(parts)
    if len(tensors) == 1:
        tensors, starts = tensors * len(parts), [sum(rows[:part]) for part in range(len(parts))]
    return [_Source(*source) for source in zip(tensors, starts, rows, target.get_metadata()["parts"], strict=True)]


class _Source:
    """Rows of a checkpoint's tensor as a part of a fused parameter: `part` rows of every block.

    KV heads may be fewer in the checkpoint than on the mesh; each is then repeated in neighbouring blocks.
    """

    def __init__(self, tensor: Any, first_row: int, stored_rows: int, part: int):
        self._tensor = tensor
        self._first_row, self._stored_rows = first_row, stored_rows
        self.part = part

    def blocks(self, first: int, last: int, total: int, rest: tuple[slice, ...]) -> np.ndarray:
        """Blocks `first` to `last` of `total`: `[last - first, part, ...]`."""
        repeats = total * self.part // self._stored_rows
        low, high = first // repeats, -(-last // repeats)
        rows = self._tensor[(slice(self._first_row + low * self.part, self._first_row + high * self.part), *rest)]
        blocks = rows.reshape(high - low, self.part, *rows.shape[1:])
        return np.repeat(blocks, repeats, axis=0)[first - low * repeats : last - low * repeats]

    def rows(self, start: int, stop: int, rest: tuple[slice, ...]) -> np.ndarray:
        """Rows `start` to `stop`, zeros where the checkpoint has none (a padded vocabulary)."""
        found = self._tensor[(slice(min(start, self._stored_rows - 1), min(stop, self._stored_rows)), *rest)]
        found = found if start < self._stored_rows else found[:0]
        missing = stop - start - len(found)
        return np.pad(found, ((0, missing), *((0, 0),) * (found.ndim - 1))) if missing else found


def _fuse(sources: list[_Source], shape: tuple[int, ...], dtype: jnp.dtype) -> Callable[[Any], np.ndarray]:
    """A function that reads any index of the fused parameter from the sources that it is made of."""
    block_rows = sum(source.part for source in sources)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        if len(sources) == 1:
            return sources[0].rows(start, stop, index[1:]).astype(dtype)
        first, last, total = start // block_rows, stop // block_rows, shape[0] // block_rows
        blocks = np.concatenate([source.blocks(first, last, total, index[1:]) for source in sources], axis=1)
        return blocks.reshape(stop - start, *blocks.shape[2:]).astype(dtype)

    return read
