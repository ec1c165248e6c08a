"""Parameters handed from a trainer to an engine that serves the same model."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.checkpoint.fusing import unfused
from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.checkpoint.placement import Plan, place
from jaxserve.checkpoint.quantised import made_from, made_of
from jaxserve.errors import InputError
from jaxserve.layers.linear import quantised
from jaxserve.layers.quantisation import Quantised
from jaxserve.models.config import ModelConfig


class Handover(NamedTuple):
    """A new array for one parameter, and the `parts` that it and the served one are fused of.

    With `made_into` it is the weight that the parameter is to be made of.
    """

    name: str
    array: jax.Array
    own_parts: tuple[int, ...]
    parts: tuple[int, ...]
    made_into: Quantised | None = None


def match(new: nnx.State, served: nnx.State, config: ModelConfig) -> list[Handover]:
    """What `new` holds for each of `served`'s arrays, in the order of `jax.tree.leaves`. Nothing is moved.

    `config` is the model as it stands on the mesh; where that repeats KV heads, `new` may hold them once. What is
    served in few bits may come as it was trained. `InputError` names the parameter that is missing, left over or of
    another shape.
    """
    if not isinstance(new, nnx.State):
        raise InputError(f"the new weights are a {type(new).__name__}; give a Flax state, such as nnx.state(model)")
    given = {_name(path): variable for path, variable in nnx.to_flat_state(new)}
    targets = nnx.to_flat_state(served)
    trained = not any(name.endswith(".scale") for name in given)
    as_given = dataclasses.replace(config, quantization=None) if trained else config
    shapes, once = (
        dict(nnx.to_flat_state(abstract_model(model, jnp.dtype(jnp.float32))[1]))
        for model in (as_given, as_given.stored)
    )
    found, taken = [], set()
    for path, target in targets:
        made_into, own_path = (quantised(target), made_from(path, target)) if trained else (None, path)
        name = _name(own_path)
        if name not in given:
            raise InputError(f"the new weights have no parameter {name}, which {config.architecture} needs")
        array, served_as, stored_as = given[name][...], shapes[own_path], once[own_path]
        taken.add(name)
        if array.shape not in (served_as.shape, stored_as.shape):
            raise InputError(
                f"parameter {name} of the new weights has shape {list(array.shape)}, and the one served has "
                f"{list(served_as.shape)}; they do not belong together"
            )
        own = served_as if array.shape == served_as.shape else stored_as
        parts = own.get_metadata()["parts"], served_as.get_metadata()["parts"]
        found.append(Handover(name, array, *parts, made_into))
    surplus = given.keys() - taken
    if surplus:
        raise InputError(
            f"the new weights hold {min(surplus)!r}, first of {len(surplus)} that {config.architecture} has no place "
            "for"
        )
    numbered = nnx.from_flat_state([(path, target.replace(i)) for i, (path, target) in enumerate(targets)])
    return [found[number] for number in jax.tree.leaves(numbered)]


def place_like(new: Handover, old: jax.Array) -> jax.Array:
    """The new array with the old one's shape, dtype and place; the very array where it has them."""
    array = new.array
    if new.made_into is not None:
        array = made_of(array, new.made_into)
    if array.dtype != old.dtype:
        array = array.astype(old.dtype)
    if array.shape != old.shape:  # KV heads to repeat: over the host, which compiles nothing
        sources = unfused(new.name, np.asarray(array), new.own_parts, new.parts)
        return place([Plan(old.shape, np.dtype(old.dtype), old.sharding, sources)])[0]
    if array.committed and array.sharding.is_equivalent_to(old.sharding, array.ndim):
        return array
    return jax.device_put(array, old.sharding)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
