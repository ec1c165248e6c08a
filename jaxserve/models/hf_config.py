"""A HuggingFace `config.json`, as `transformers` completes it, read into a `ModelConfig`.

Whatever changes the computation is taken over or refused by the name of its field.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import InputError
from jaxserve.layers.mlp import ACTIVATIONS
from jaxserve.layers.rotary import ROPE_KINDS, RopeConfig
from jaxserve.models.config import LayerKind, ModelConfig
from jaxserve.models.quantization_config import stored_quantization

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_FIELDS = {field.name for field in dataclasses.fields(RopeConfig)} - {"theta", "kind", "longest"}


def decoder_config[C: ModelConfig](
    architecture: str,
    hf: dict[str, Any],
    *,
    of: type[C] = ModelConfig,  # type: ignore[assignment]
    layer_types: Sequence[str] | None = None,
    **settings: Any,
) -> C:
    """The fields that all decoders share, and `settings` for the others of the config class `of`.

    `layer_types` names each layer's kind, as HuggingFace does; all layers attend to everything if it is left out.
    """
    require(architecture, hf, mlp_bias=(False, None), attention_bias=(False, None))
    heads, layers, max_length = hf["num_attention_heads"], hf["num_hidden_layers"], hf["max_position_embeddings"]
    kinds = _layer_kinds(architecture, hf, layer_types or [FULL] * layers)
    longest = max((_stretched(kind.rope, max_length) for kind in kinds if kind.rope), default=max_length)
    config = of(
        architecture=architecture,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        layer_kinds=kinds,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_position_embeddings=longest,
        activation=_activation(hf),
        rms_norm_eps=hf["rms_norm_eps"],
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        **stored_quantization(hf, of),
        **settings,
    )
    return config.served_up_to(longest)


def require(architecture: str, hf: dict[str, Any], **built: Sequence[Any]) -> None:
    """Refuse by its name each field whose value is not among those that this architecture is built for."""
    for field, values in built.items():
        if hf.get(field, values[0]) not in values:
            raise InputError(
                f"config.json says {field}={hf[field]!r}, and {architecture} is built for {values[0]!r} only"
            )


def rope_config(parameters: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """HuggingFace's `rope_parameters`, of one kind of layer."""
    kind = parameters.get("rope_type") or "default"
    if kind not in ROPE_KINDS:
        raise InputError(f"config.json says rope_type={kind!r}; built are {', '.join(ROPE_KINDS)}")
    given = {name: value for name, value in parameters.items() if name not in ("type", "rope_type", "rope_theta")}
    if unknown := sorted(given.keys() - _ROPE_FIELDS):
        raise InputError(
            f"config.json says {unknown[0]}={given[unknown[0]]!r} in its rope parameters, and no rope here knows that; "
            f"known are {', '.join(sorted(_ROPE_FIELDS))}"
        )
    given = {name: _number_or_numbers(name, value) for name, value in given.items() if value is not None}
    if kind == "dynamic":
        given["original_max_position_embeddings"] = max_position_embeddings
    original = given.get("original_max_position_embeddings")
    if "factor" not in given and original:
        given["factor"] = max_position_embeddings / original
    return RopeConfig(theta=parameters.get("rope_theta") or 10_000.0, kind=kind, **given)


def _number_or_numbers(name: str, value: Any) -> float | tuple[float, ...]:
    numbers = value if name.endswith(("short_factor", "long_factor")) else [value]
    if not isinstance(numbers, list) or not all(isinstance(number, int | float) for number in numbers):
        wanted = "a list of numbers" if numbers is value else "a number"
        raise InputError(f"config.json says {name}={value!r} in its rope parameters; give {wanted}")
    return tuple(numbers) if numbers is value else value


def _layer_kinds(architecture: str, hf: dict[str, Any], layer_types: Sequence[str]) -> tuple[LayerKind, ...]:
    if unknown := [name for name in layer_types if name not in LAYER_TYPES]:
        raise InputError(f"config.json has {unknown[0]!r} among its layer_types; built are {', '.join(LAYER_TYPES)}")
    if len(layer_types) != hf["num_hidden_layers"]:
        raise InputError(
            f"config.json has {len(layer_types)} layer_types for {hf['num_hidden_layers']} num_hidden_layers"
        )
    if (hf.get("layer_types") or layer_types) != list(layer_types):
        raise InputError(f"config.json has layer_types, and {architecture} has layers of type {layer_types[0]!r} only")
    window = hf.get("sliding_window")
    if SLIDING in layer_types and not (isinstance(window, int) and window > 0):
        raise InputError(
            f"config.json says sliding_window={window!r} and has sliding layers; give a number of positions"
        )
    given = hf.get("rope_parameters") or {}
    by_type = {name: given.get(name) or {} if given.keys() & set(LAYER_TYPES) else given for name in LAYER_TYPES}
    kinds = {
        name: LayerKind(
            rope=rope_config(by_type[name], hf["max_position_embeddings"]), window=window if name == SLIDING else None
        )
        for name in dict.fromkeys(layer_types)
    }
    return tuple(kinds[name] for name in layer_types)


def uniform_layer_types(hf: dict[str, Any]) -> list[str]:
    """Of a family whose layers are all of one kind: sliding ones if there is a window."""
    return [FULL if hf.get("sliding_window") is None else SLIDING] * hf["num_hidden_layers"]


def _stretched(rope: RopeConfig, max_position_embeddings: int) -> int:
    """How long a text the rope reaches, where the config's `max_position_embeddings` may be the length before it."""
    if rope.kind in ("dynamic", "yarn"):
        return max(max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
    return max_position_embeddings


def _activation(hf: dict[str, Any]) -> str:
    field = "hidden_activation" if "hidden_activation" in hf else "hidden_act"
    name = hf.get(field) or "silu"
    if name not in ACTIVATIONS:
        raise InputError(f"config.json says {field}={name!r}; built are {', '.join(ACTIVATIONS)}")
    return name
