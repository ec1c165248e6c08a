"""HuggingFace model directories, read onto a mesh shard by shard and written back."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxserve.checkpoint import eight_bits
from jaxserve.checkpoint.filling import assign
from jaxserve.checkpoint.fp8_blocks import Fp8Directory
from jaxserve.checkpoint.fusing import Source, Sources, overlaps
from jaxserve.checkpoint.packed_integers import PackedDirectory
from jaxserve.checkpoint.placement import Plan, place
from jaxserve.checkpoint.safetensors_files import SINGLE_FILE, SafetensorsDirectory, write_file
from jaxserve.checkpoint.stacks import stacked_tensors, unstack
from jaxserve.errors import InputError
from jaxserve.layers.linear import Stack
from jaxserve.models.config import Fp8Blocks, ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import ARCHITECTURES, make_model, model_class
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
    graph, state = _abstract_model(config, dtype)
    return graph, jax.tree.map(lambda shape: shape, state)


@functools.lru_cache(maxsize=8)  # a start asks for it three times, and it takes as long as reading half a gigabyte
def _abstract_model(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: make_model(config, dtype=dtype, rngs=nnx.Rngs(0)))
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
    on_mesh = config.over_tensor_axis(mesh.shape[TENSOR])
    graph, state = _abstract_model(on_mesh, dtype or jnp.dtype(jnp.float32))  # nothing here changes it
    targets = stored = dict(nnx.to_flat_state(state))
    if on_mesh != config:
        stored = dict(nnx.to_flat_state(_abstract_model(config, dtype or jnp.dtype(jnp.float32))[1]))
    shardings = dict(nnx.to_flat_state(parameter_shardings(mesh, state)))
    files = _files(directory, config)
    used, plans = set(), []
    for path, variable in stored.items():
        target, names = targets[path], _hf_names(model_class(config), path)
        sources, kinds, own = _sources(files, names, variable, target)
        used.update(own)
        kind = target.dtype if dtype else np.result_type(*kinds)
        plans.append(Plan(target.shape, np.dtype(kind), shardings[path], sources))
    surplus = [name for name in files.names() if name not in used and not _DERIVED.search(name)]
    surplus = [name for name in surplus if not name.startswith(config.unused_tensors)]
    if config.quantization is not None:
        surplus = [
            name for name in surplus if not name.endswith(".input_scale")
        ]  # of activations: they stay as they are
    if config.tie_word_embeddings:
        surplus = [name for name in surplus if name != "lm_head.weight"]  # some writers repeat the tied table
    if surplus:
        raise InputError(
            f"{directory} holds {surplus[0]!r}, first of {len(surplus)} that {config.architecture} has no place for; "
            "its config.json and its weights do not belong together"
        )
    arrays = place(plans, on_bytes)
    return graph, nnx.from_flat_state(
        [(path, targets[path].replace(array)) for path, array in zip(stored, arrays, strict=True)]
    )


def _files(directory: Path, config: ModelConfig) -> SafetensorsDirectory:
    if config.packing is None:
        return SafetensorsDirectory(directory)
    if isinstance(config.packing, Fp8Blocks):
        return Fp8Directory(directory, config.packing)
    return PackedDirectory(directory, config.packing)


def save_weights(model: Decoder, directory: Path, dtype: jnp.dtype | None = jnp.bfloat16) -> None:
    """Write `model`'s parameters to `directory`/model.safetensors under HuggingFace's names.

    Without a `dtype`, each keeps its own. KV heads that stand on a mesh several times are written once. `InputError`
    if the file cannot be written, and then there is none.
    """
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    stored = nnx.to_flat_state(abstract_model(model.config.stored, jnp.dtype(jnp.float32))[1])
    names = {path: _hf_names(type(model), path) for path, _ in stored}
    kinds = {path: np.dtype(dtype or parameters[path].dtype) for path, _ in stored}
    single = [(path, variable) for path, variable in stored if variable.get_metadata().get("stacked") is None]
    shapes = {
        name: (kinds[path], shape)
        for path, variable in single
        for name, shape in zip(names[path], _stored_shapes(variable, len(names[path])), strict=True)
    }
    stacked: dict[str, np.ndarray] = {}
    for path, variable in stored:
        if (stack := variable.get_metadata().get("stacked")) is not None:
            rows = np.asarray(parameters[path][...]).astype(kinds[path])
            _take_apart(stacked, names[path], variable.get_metadata()["parts"], stack, rows)

    def tensors() -> Iterator[np.ndarray]:
        for path, variable in single:
            fused = np.asarray(parameters[path][...])
            found = [np.empty(shapes[name][1], shapes[name][0]) for name in names[path]]
            parts = variable.get_metadata()["parts"], parameters[path].get_metadata()["parts"]
            sources = _parts(names[path], found, variable.shape, *parts)
            for _, part, rows in overlaps(sources, fused.shape, (slice(None),) * fused.ndim, fused):
                assign(rows, part)
            yield from found
        yield from stacked.values()

    written = shapes | {name: (tensor.dtype, tensor.shape) for name, tensor in stacked.items()}
    write_file(directory / SINGLE_FILE, written, tensors())


def _take_apart(
    tensors: dict[str, np.ndarray], names: list[str], parts: tuple[int, ...], stack: Stack, rows: np.ndarray
) -> None:
    """Put a stacked parameter into `tensors` as a checkpoint has it."""
    if "{}" not in names[0]:
        unstack(tensors, names[0], stack, rows)
        return
    for entry, own in enumerate(rows):
        tensors |= _split([name.format(entry) for name in names], parts, own)


def _split(names: list[str], parts: tuple[int, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
    """A fused parameter as the tensors that it is made of."""
    if len(parts) == 1:
        return {names[0]: rows[: parts[0]]}
    blocks = rows.reshape(-1, sum(parts), *rows.shape[1:])
    pieces = [part.reshape(-1, *rows.shape[1:]) for part in np.split(blocks, np.cumsum(parts)[:-1], axis=1)]
    return dict(zip(names, pieces if len(names) > 1 else [np.concatenate(pieces)], strict=True))


def _hf_names(model: type[Decoder], path: tuple) -> list[str]:
    """The checkpoint's names for the parameter at `path`, such as `("layers", 3, "mlp", "down", "weight")`."""
    *module, leaf = path
    numbers = [str(step) for step in module if isinstance(step, int)]
    pattern = ".".join("{}" if isinstance(step, int) else step for step in module)
    if f"{pattern}.{leaf}" in model.HF_NAMES:  # of parameters that are not called after their leaf
        return [name.format(*numbers) for name in model.HF_NAMES[f"{pattern}.{leaf}"]]
    leaf = "weight_scale" if leaf == "scale" else leaf
    return [f"{name.format(*numbers)}.{leaf}" for name in model.HF_NAMES[pattern]]


def _stored_shapes(stored: nnx.Variable, count: int) -> list[tuple[int, ...]]:
    """The shapes of the `count` tensors that make up a parameter; one alone has all parts, one after the other."""
    parts = stored.get_metadata()["parts"]
    blocks = stored.shape[0] // sum(parts) if len(parts) > 1 else 1
    rows = [blocks * part for part in parts]
    return [(height, *stored.shape[1:]) for height in ([sum(rows)] if count == 1 else rows)]


def _sources(
    files: SafetensorsDirectory, names: list[str], stored: nnx.Variable, target: nnx.Variable
) -> tuple[Sources, list[np.dtype], list[str]]:
    """What `target` is made of, with the dtypes and names of the tensors; `stored` is the parameter unrepeated."""
    parts = stored.get_metadata()["parts"], target.get_metadata()["parts"]
    stack = stored.get_metadata().get("stacked")
    if stack is None:
        read = [eight_bits.tensor(files, name, stored) for name in names]
        tensors, own = [tensor for tensor, _ in read], [name for _, used in read for name in used]
        return _parts(names, tensors, stored.shape, *parts), [tensor.dtype for tensor in tensors], own
    found = [stacked_tensors(files, name, stack, stored.shape) for name in names]
    entries = list(zip(*(rows for rows, _ in found), strict=True))
    sources = [
        _parts([name.format(entry) for name in names], list(tensors), stored.shape[1:], *parts)
        for entry, tensors in enumerate(entries)
    ]
    return sources, [rows.dtype for rows in entries[0]], [name for _, own in found for name in own]


def _parts(
    names: list[str],
    tensors: list[np.ndarray],
    shape: tuple[int, ...],
    parts: tuple[int, ...],
    target_parts: tuple[int, ...],
) -> list[Source]:
    """The tensors as the parts of a parameter, after a check of their shapes against its own, `shape`.

    One tensor for several parts has them fused already, one after the other.
    """
    blocks = shape[0] // sum(parts) if len(parts) > 1 else 1
    rows = [blocks * part for part in parts]
    for name, tensor, height in zip(names, tensors, [sum(rows)] if len(names) == 1 else rows, strict=True):
        found, expected = list(tensor.shape), [height, *shape[1:]]
        if found != expected:
            raise InputError(
                f"tensor {name!r} has shape {found}, and by config.json it is {expected}; they do not belong together"
            )
    if len(names) == 1 and len(parts) > 1:
        ends = list(itertools.accumulate(rows))
        names, tensors = names * len(parts), [tensors[0][end - own : end] for own, end in zip(rows, ends, strict=True)]
    return [Source(*source) for source in zip(names, tensors, target_parts, strict=True)]
