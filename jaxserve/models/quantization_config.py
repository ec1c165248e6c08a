"""What a HuggingFace `quantization_config` says of a checkpoint's weights."""

from typing import Any

from jaxserve.errors import InputError
from jaxserve.layers.quantisation import INT4
from jaxserve.models.config import Fp8Blocks, ModelConfig, PackedIntegers

_METHODS = ("compressed-tensors", "fp8", "gptq", "awq")
_NOT_QUANTISED: tuple[Any, ...] = (None, [], ["lm_head"])  # layers: all others' weights are of one kind
_ORDERS_OF_NEIGHBOURS = (None, False, "weight", "static")  # that columns were rounded in
_KINDS = {"int": "int8", "float": "fp8"}
_PACKED = "pack-quantized"
_EIGHT_BITS = ("int-quantized", "float-quantized", "naive-quantized")


def stored_quantization(hf: dict[str, Any], model: type[ModelConfig]) -> dict[str, Any]:
    """What a config of the class `model` is told of it; nothing if the checkpoint's weights are not quantised.

    Linear layers in eight bits with a scale for every output or one for all are served so, as compressed-tensors
    writes them, and as `fp8` without blocks does. So are integers of four bits, if all linear layers are packed so in
    groups of neighbours, and the model has no weights but theirs. Others that are packed, and FP8 in blocks, are
    unpacked. Activations that any of these would round as well are left as they are, which is more exact. `InputError`
    names the field that asks for something else.
    """
    config = hf.get("quantization_config")
    if not config:
        return {}
    stored = _stored(config)
    packing = stored.get("packing")
    if isinstance(packing, PackedIntegers) and packing.is_int4 and model.of_linear_layers:
        stored["quantization"] = INT4
    return stored


def _stored(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise InputError(f"config.json says quantization_config={config!r}; give an object")
    _require("quant_method", config, _METHODS)
    match config["quant_method"]:
        case "fp8":
            return _fp8(config)
        case "gptq":
            _require("bits", config, (4, 8))
            _require("lm_head", config, (False, None))
            _require("dynamic", config, (None, {}))  # layers of other kinds
            _require("checkpoint_format", config, ("gptq", "gptq_v2", None))
            offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            uniform = not config.get("desc_act") and not config.get("modules_in_block_to_quantize")
            return {"packing": PackedIntegers("gptq", config["bits"], _group_size(config), offset, uniform)}
        case "awq":
            _require("bits", config, (4,))
            _require("version", config, ("gemm", "GEMM", None))
            uniform = config.get("modules_to_not_convert") in _NOT_QUANTISED
            return {"packing": PackedIntegers("awq", config["bits"], _group_size(config), uniform=uniform)}
        case _:
            return _compressed_tensors(config)


def _fp8(config: dict[str, Any]) -> dict[str, Any]:
    _require("fmt", config, ("e4m3", None))
    block = config.get("weight_block_size")
    if block is None:
        for field in ("modules_to_not_convert", "ignored_layers"):
            _require(field, config, _NOT_QUANTISED)
        return {"quantization": "fp8"}
    if not (isinstance(block, list) and [type(size) for size in block] == [int, int] and min(block) > 0):
        raise InputError(
            f"config.json's quantization_config says weight_block_size={block!r}; give the rows and columns of a block"
        )
    return {"packing": Fp8Blocks(*block)}


def _compressed_tensors(config: dict[str, Any]) -> dict[str, Any]:
    _require("kv_cache_scheme", config, (None,))
    _require("format", config, (*_EIGHT_BITS, _PACKED))
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise InputError("config.json's quantization_config has not one of config_groups; weights all alike are served")
    (group,) = groups.values()
    _require("targets", group, (["Linear"],))
    weights = group.get("weights") or {}
    _require("dynamic", weights, (False, None))
    _require("block_structure", weights, (None,))
    if config["format"] == _PACKED:
        _require("type", weights, ("int",))
        _require("num_bits", weights, (4, 8))
        _require("strategy", weights, ("group", "channel"))
        size = _group_size(weights) if weights["strategy"] == "group" else None
        uniform = config.get("ignore") in _NOT_QUANTISED and weights.get("actorder") in _ORDERS_OF_NEIGHBOURS
        return {"packing": PackedIntegers("compressed-tensors", weights["num_bits"], size, uniform=uniform)}
    _require("ignore", config, _NOT_QUANTISED)
    _require("type", weights, tuple(_KINDS))
    _require("num_bits", weights, (8,))
    _require("strategy", weights, ("channel", "tensor"))
    _require("symmetric", weights, (True, None))
    _require("group_size", weights, (None,))
    return {"quantization": _KINDS[weights["type"]]}


def _group_size(config: dict[str, Any]) -> int | None:
    size = config.get("group_size")
    if type(size) is not int or not (size == -1 or size > 0):
        raise InputError(
            f"config.json's quantization_config says group_size={size!r}; give how many weights share a scale, or -1 "
            "if a row does"
        )
    return None if size == -1 else size


def _require(field: str, given: dict[str, Any], built: tuple[Any, ...]) -> None:
    if given.get(field) not in built:
        raise InputError(
            f"config.json's quantization_config says {field}={given.get(field)!r}, and quantised weights are served "
            f"with {', '.join(repr(value) for value in built if value is not None)} only; give another checkpoint"
        )
