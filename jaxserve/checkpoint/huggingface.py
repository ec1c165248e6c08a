"""HuggingFace model directories, read onto a mesh shard by shard and written back."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxserve.checkpoint import quantised
from jaxserve.checkpoint.filling import assign
from jaxserve.checkpoint.fp8_blocks import Fp8Directory
from jaxserve.checkpoint.fusing import Source, Sources, overlaps, rows_of_parts
from jaxserve.checkpoint.packed_integers import PackedDirectory
from jaxserve.checkpoint.placement import Plan, place
from jaxserve.checkpoint.safetensors_files import SINGLE_FILE, SafetensorsDirectory, write_file
from jaxserve.checkpoint.stacks import stacked_tensors, unstack
from jaxserve.errors import InputError
from jaxserve.layers.linear import Stack
from jaxserve.layers.linear import quantised as quantised_part
from jaxserve.layers.quantisation import Quantised
from jaxserve.models.config import Fp8Blocks, ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import ARCHITECTURES, make_model, model_class
from jaxserve.parallel.mesh import TENSOR, shardings_by_partition

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


class _Parameter(NamedTuple):
    """An array that the model is to have, and how a checkpoint holds it: see `Linear` and `Stack`."""

    path: tuple[Any, ...]
    names: list[str]
    shape: tuple[int, ...]
    dtype: np.dtype
    partition: PartitionSpec
    parts: tuple[int, ...]
    stack: Stack | None
    quantised: Quantised | None


class _Abstract(NamedTuple):
    graph: nnx.GraphDef
    state: nnx.State
    tree: jax.tree_util.PyTreeDef  # the state's
    parameters: list[_Parameter]  # in the order of its leaves


def abstract_model(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters as shapes only."""
    graph, state, *_ = _abstract_model(config, dtype)
    return graph, jax.tree.map(lambda shape: shape, state)


def module_names(config: ModelConfig, dtype: jnp.dtype) -> dict[str, list[str]]:
    """What a checkpoint calls the modules whose weights each of the model's, such as `layers.0.mlp.gate_up`, fuses."""
    return {
        ".".join(map(str, own.path[:-1])): [name.removesuffix(".weight") for name in own.names]
        for own in _abstract_model(config, dtype).parameters
        if own.path[-1] == "weight" and own.stack is None
    }


@functools.lru_cache(maxsize=8)  # a start asks for it three times, and it takes as long as reading half a gigabyte
def _abstract_model(config: ModelConfig, dtype: jnp.dtype) -> _Abstract:
    graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, dtype=dtype, rngs=nnx.Rngs(0))))
    model = model_class(config)
    parameters = []
    for path, variable in nnx.to_flat_state(state):
        own = variable.get_metadata()
        rules = own["partition"], own["parts"], own.get("stacked"), quantised_part(variable)
        names = _hf_names(model, path)
        parameters.append(_Parameter(path, names, variable.shape, np.dtype(variable.dtype), *rules))
    return _Abstract(graph, state, jax.tree.structure(state), parameters)


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
    model = _abstract_model(config.over_tensor_axis(mesh.shape[TENSOR]), dtype or jnp.dtype(jnp.float32))
    unrepeated = _abstract_model(config, dtype or jnp.dtype(jnp.float32))
    sharding_of = shardings_by_partition(mesh)
    files = _files(directory, config)
    used, plans = set(), []
    for stored, target in zip(unrepeated.parameters, model.parameters, strict=True):
        sources, kinds, own = _sources(files, stored, target, kept=config.keeps_packing)
        used.update(own)
        kind = target.dtype if dtype else np.result_type(*kinds)
        plans.append(Plan(target.shape, kind, sharding_of(target.partition), sources))
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
    return model.graph, jax.tree.unflatten(model.tree, place(plans, on_bytes))


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
    stored = _abstract_model(model.config.stored, jnp.dtype(jnp.float32)).parameters
    kinds = {own.path: np.dtype(dtype or parameters[own.path].dtype) for own in stored}
    single = [own for own in stored if own.stack is None]
    shapes = {
        name: (kinds[own.path], shape)
        for own in single
        for name, shape in zip(own.names, _stored_shapes(own), strict=True)
    }
    stacked: dict[str, np.ndarray] = {}
    for own in stored:
        if own.stack is not None:
            rows = np.asarray(parameters[own.path][...]).astype(kinds[own.path])
            _take_apart(stacked, own.names, own.parts, own.stack, rows)

    def tensors() -> Iterator[np.ndarray]:
        for own in single:
            parameter = parameters[own.path]
            fused = np.asarray(parameter[...])
            found = [np.empty(shapes[name][1], shapes[name][0]) for name in own.names]
            sources = _parts(own.names, found, own.shape, own.parts, parameter.get_metadata()["parts"])
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
    leaf = f"weight_{leaf}" if leaf in ("scale", "zero") else leaf
    return [f"{name.format(*numbers)}.{leaf}" for name in model.HF_NAMES[pattern]]


def _stored_shapes(stored: _Parameter) -> list[tuple[int, ...]]:
    """The shapes of the tensors that make up a parameter; one alone has all parts, one after the other."""
    rows = rows_of_parts(stored.shape[0], stored.parts)
    return [(height, *stored.shape[1:]) for height in ([sum(rows)] if len(stored.names) == 1 else rows)]


def _sources(
    files: SafetensorsDirectory, stored: _Parameter, target: _Parameter, *, kept: bool
) -> tuple[Sources, list[np.dtype], list[str]]:
    """What `target` is made of, with the dtypes and names of the tensors; `stored` is the parameter unrepeated."""
    if stored.stack is None:
        read = [quantised.tensor(files, name, target.quantised, kept=kept) for name in stored.names]
        tensors, own = [tensor for tensor, _ in read], [name for _, used in read for name in used]
        shape = stored.shape[0], *target.shape[1:]
        sources: Sources = _parts(stored.names, tensors, shape, stored.parts, target.parts)
        return sources, [tensor.dtype for tensor in tensors], own
    found = [stacked_tensors(files, name, stored.stack, stored.shape) for name in stored.names]
    entries = list(zip(*(rows for rows, _ in found), strict=True))
    parts = stored.shape[1:], stored.parts, target.parts
    sources = [
        _parts([name.format(entry) for name in stored.names], list(tensors), *parts)
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
    rows = rows_of_parts(shape[0], parts)
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
