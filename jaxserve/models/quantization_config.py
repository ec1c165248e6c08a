"""What a HuggingFace `quantization_config` says of a checkpoint's weights."""

from typing import Any

from jaxserve.errors import InputError

_WEIGHTS: dict[str, tuple[Any, ...]] = {  # what is built, by field of a group's `weights`
    "num_bits": (8,),
    "strategy": ("channel", "tensor"),
    "symmetric": (True, None),
    "dynamic": (False, None),
    "group_size": (None,),
    "block_structure": (None,),
    "actorder": (None,),
}
_KINDS = {"int": "int8", "float": "fp8"}
_NOT_QUANTISED: tuple[Any, ...] = (None, [], ["lm_head"])  # layers: all others' weights are of one kind
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")


def stored_quantization(hf: dict[str, Any]) -> dict[str, Any]:
    """What `ModelConfig` is told of it; nothing if the checkpoint's weights are not quantised.

    Served are linear layers in eight bits with a scale for every output or one for all, as compressed-tensors writes
    them, and as `fp8` without blocks does. Activations that those would round as well are left as they are, which is
    more exact. FP8 in blocks is unpacked, wherever it is. `InputError` names the field that asks for something else.
    """
    config = hf.get("quantization_config")
    if not config:
        return {}
    if not isinstance(config, dict):
        raise InputError(f"config.json says quantization_config={config!r}; give an object")
    _require("quant_method", config, ("compressed-tensors", "fp8"))
    if config["quant_method"] == "fp8":
        _require("fmt", config, ("e4m3", None))
        if (block := config.get("weight_block_size")) is not None:
            return {"fp8_block": _block(block)}
        for field in ("modules_to_not_convert", "ignored_layers"):
            _require(field, config, _NOT_QUANTISED)
        return {"quantization": "fp8"}
    _require("format", config, _FORMATS)
    _require("kv_cache_scheme", config, (None,))
    _require("ignore", config, _NOT_QUANTISED)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise InputError("config.json's quantization_config has not one of config_groups; weights all alike are served")
    (group,) = groups.values()
    _require("targets", group, (["Linear"],))
    weights = group.get("weights") or {}
    for field, built in _WEIGHTS.items():
        _require(field, weights, built)
    _require("type", weights, tuple(_KINDS))
    return {"quantization": _KINDS[weights["type"]]}


def _block(given: Any) -> tuple[int, int]:
    if not (isinstance(given, list) and [type(size) for size in given] == [int, int] and min(given) > 0):
        raise InputError(
            f"config.json's quantization_config says weight_block_size={given!r}; give the rows and columns of a block"
        )
    return given[0], given[1]


def _require(field: str, given: dict[str, Any], built: tuple[Any, ...]) -> None:
    if given.get(field) not in built:
        raise InputError(
            f"config.json's quantization_config says {field}={given.get(field)!r}, and quantised weights are served "
            f"with {', '.join(repr(value) for value in built if value is not None)} only; give another checkpoint"
        )
