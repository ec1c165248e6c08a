"""Orbax checkpoints of the Flax models: what a training script saved, or what `jaxserve convert` made."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxserve.checkpoint.fusing import unfused
from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.checkpoint.placement import Plan, place
from jaxserve.checkpoint.quantised import made_from, made_of
from jaxserve.errors import InputError, first_line
from jaxserve.layers.linear import quantised
from jaxserve.layers.quantisation import INT4
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import TENSOR, parameter_shardings

_ITEM_FILE = "_METADATA"  # which Orbax writes into the directory of every tree that it saves
_STEP = re.compile(r"(?:.*_)?(\d+)")
_USUAL_ITEMS = ("params", "model", "state", "default")  # of a step with several trees, in this order

Name = tuple[str, ...]  # from a tree's root to a parameter


def find_orbax(directory: Path) -> Path | None:
    """The saved tree in `directory`, which is one, holds one, or holds the steps of a training run; else None.

    Of steps it is the latest that is complete.
    """
    if (directory / _ITEM_FILE).is_file():
        return directory
    items = {path.parent.name: path.parent for path in directory.glob(f"*/{_ITEM_FILE}")}
    if items:
        usual = [name for name in _USUAL_ITEMS if name in items]
        return items[usual[0] if usual else min(items)]
    steps = {int(match[1]): path for path in directory.iterdir() if (match := _STEP.fullmatch(path.name))}
    found = [item for _, path in sorted(steps.items()) if path.is_dir() and (item := find_orbax(path))]
    return found[-1] if found else None


def load_weights(
    item: Path,
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model of a saved tree, which may hold more (an optimizer's state, say), restored right onto `mesh`.

    Only where a mesh repeats KV heads do the weights that hold them pass through the host. Arguments and errors are
    those of `huggingface.load_weights`.
    """
    if config.quantization is not None:
        return _quantised(item, config, mesh, dtype, on_bytes)
    graph, state = abstract_model(config, jnp.dtype(jnp.float32))
    stored = _by_name(state)
    if (on_mesh := config.over_tensor_axis(mesh.shape[TENSOR])) != config:
        graph, state = abstract_model(on_mesh, jnp.dtype(jnp.float32))
    shardings = dict(nnx.to_flat_state(parameter_shardings(mesh, state)))
    saved, prefix = _saved(item, config, stored)

    direct, through_host = {}, {}
    for path, target in nnx.to_flat_state(state):
        name = tuple(map(str, path))
        kind = np.dtype(dtype or saved[name].dtype)
        if target.shape == stored[name].shape:
            direct[name] = jax.ShapeDtypeStruct(target.shape, kind, sharding=shardings[path])
        else:
            through_host[name] = Plan(target.shape, kind, shardings[path], [])
    restored = _restore(item, prefix, saved, direct, list(through_host))
    targets = {tuple(map(str, path)): target for path, target in nnx.to_flat_state(state)}
    plans = [
        plan._replace(
            sources=unfused(
                ".".join(name),
                restored[name],
                stored[name].get_metadata()["parts"],
                targets[name].get_metadata()["parts"],
            )
        )
        for name, plan in through_host.items()
    ]
    restored |= dict(zip(through_host, place(plans), strict=True))
    total = sum(array.nbytes for array in restored.values())
    on_bytes(total, total)
    return graph, nnx.from_flat_state(
        [(path, target.replace(restored[tuple(map(str, path))])) for path, target in nnx.to_flat_state(state)]
    )


def _quantised(
    item: Path, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype | None, on_bytes: Callable[[int, int], None]
) -> tuple[nnx.GraphDef, nnx.State]:
    """What `load_weights` gives: the weights as they were saved, all on the mesh, and then in few bits one by one."""
    _, whole = load_weights(item, dataclasses.replace(config, quantization=None), mesh, dtype, on_bytes)
    graph, state = abstract_model(config.over_tensor_axis(mesh.shape[TENSOR]), jnp.dtype(jnp.float32))
    shardings = dict(nnx.to_flat_state(parameter_shardings(mesh, state)))
    saved, made = dict(nnx.to_flat_state(whole)), []
    for path, target in nnx.to_flat_state(state):  # a layer's scale comes before its weight, and its zero behind it
        array = saved[made_from(path, target)][...]
        if (own := quantised(target)) is not None:
            array = jax.device_put(made_of(array, own), shardings[path])
            if own.part == ("zero" if own.kind == INT4 else "weight"):
                del saved[made_from(path, target)]
        made.append((path, target.replace(array)))
    return graph, nnx.from_flat_state(made)


def save_weights(state: nnx.State, directory: Path) -> None:
    """Save the parameters under `params`, as training scripts do; `directory` is made."""
    import orbax.checkpoint as ocp  # on demand: its import takes a second

    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        _put(tree, ("params", *map(str, path)), variable[...])
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), tree)


def _by_name(state: nnx.State) -> dict[Name, nnx.Variable]:
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _saved(item: Path, config: ModelConfig, wanted: dict[Name, nnx.Variable]) -> tuple[dict[Name, Any], Name]:
    """Shape and dtype of each of the model's parameters in the saved tree, and where in it the model is."""
    import orbax.checkpoint as ocp

    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(item.absolute()).tree
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{item} is damaged ({first_line(error)}); save it again") from error
    flat = {
        tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    first = next(iter(wanted))
    places = [path[: -len(first)] for path in map(_without_value, flat) if path[-len(first) :] == first]
    if not places:
        raise InputError(
            f"{item} holds no parameter {'.'.join(first)}, which {config.architecture} needs; "
            "save the state of jaxserve's own model"
        )
    prefix = min(places, key=len)  # an optimizer's copies lie deeper
    saved = {_without_value(path)[len(prefix) :]: leaf for path, leaf in flat.items() if path[: len(prefix)] == prefix}
    for name, variable in wanted.items():
        if name not in saved:
            raise InputError(f"{item} has no parameter {'.'.join(name)}, which {config.architecture} needs")
        if tuple(saved[name].shape) != variable.shape:
            raise InputError(
                f"parameter {'.'.join(name)} of {item} has shape {list(saved[name].shape)}, and by config.json it is "
                f"{list(variable.shape)}; they do not belong together"
            )
    surplus = [name for name in saved if name not in wanted]
    if prefix and surplus:
        raise InputError(
            f"{item} holds {'.'.join(surplus[0])!r}, first of {len(surplus)} that {config.architecture} has no place "
            "for; its config.json and its weights do not belong together"
        )
    return saved, prefix


def _restore(
    item: Path, prefix: Name, saved: dict[Name, Any], direct: dict[Name, jax.ShapeDtypeStruct], to_host: list[Name]
) -> dict[Name, Any]:
    """The parameters `direct` as they are to lie on devices, those of `to_host` as numpy arrays."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    whole = {name: (*prefix, *name, *_value(saved[name])) for name in (*direct, *to_host)}
    for name, path in whole.items():
        if name in direct:
            wanted = direct[name]
            _put(tree, path, wanted)
            _put(arguments, path, ocp.ArrayRestoreArgs(dtype=wanted.dtype, sharding=wanted.sharding))
        else:
            _put(tree, path, 0)
            _put(arguments, path, ocp.RestoreArgs(restore_type=np.ndarray))
    try:
        restored = ocp.PyTreeCheckpointHandler().restore(
            item.absolute(), args=ocp.args.PyTreeRestore(tree, restore_args=arguments, partial_restore=True)
        )
    except Exception as error:
        # Orbax tells of an array that cannot be read in a bare Exception, of all that TensorStore knows of it.
        reason = error.__cause__ if type(error) is Exception else error
        if not isinstance(reason, ValueError | OSError | KeyError):
            raise
        raise InputError(f"{item} is damaged ({first_line(reason)}); save it again") from reason
    return {name: _get(restored, path) for name, path in whole.items()}


def _without_value(path: Name) -> Name:
    """A Flax state is saved with a key `value` below each parameter, plain arrays without."""
    return path[:-1] if path[-1] == "value" else path


def _value(metadata: Any) -> Name:
    return ("value",) if str(metadata.name).endswith(".value") else ()


def _put(tree: dict[str, Any], path: Name, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _get(tree: Any, path: Name) -> Any:
    for key in path:
        tree = tree[key]
    return tree
