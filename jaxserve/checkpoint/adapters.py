"""Adapters of low rank, as PEFT saves them, made ready for the layers of one model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.checkpoint import hub
from jaxserve.checkpoint.fusing import rows_of_parts
from jaxserve.checkpoint.huggingface import abstract_model, module_names
from jaxserve.checkpoint.safetensors_files import map_file
from jaxserve.errors import InputError
from jaxserve.layers.linear import Linear
from jaxserve.layers.low_rank import LowRank, adaptable
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import TENSOR, shardings_by_partition

_CONFIG, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Fields of adapter_config.json that are read here, that the tensors tell as well, or that matter to training alone. By
# any other an adapter may do more than to add a product of low rank to linear layers.
_SERVED = {
    *("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type"),
    *("base_model_name_or_path", "auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "ensure_weight_tying"),
}
_RANK = 16  # of adapters that are to come, where nothing says more
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that change the base model's weights


class Pair(NamedTuple):
    """`up @ down` is added to a weight `[out, in]`."""

    down: np.ndarray  # [rank, in]
    up: np.ndarray  # float32 [out, rank], scaled


class Adapter(NamedTuple):
    """What one adapter adds, in the shapes of its place: numpy arrays by layer, zeros where it adds nothing."""

    name: str
    arrays: dict[str, LowRank]


class Adapters:
    """Places for adapters in the layers of one model on a mesh. Requests know them by number, from 1 on.

    `shapes` are the arrays' of all places together, by layer, with the shardings that they are to have; `one` are those
    of one place. `first` are the adapters that are there from the start, in their order.
    """

    def __init__(
        self,
        named: dict[str, str],
        config: ModelConfig,
        mesh: Mesh,
        dtype: jnp.dtype,
        *,
        places: int | None = None,
        rank: int | None = None,
    ):
        """Reads those in these directories, or with these ids of HuggingFace's hub, for the model `config`.

        With no more `places` than these take, there are arrays for the layers alone that they add to, and with no
        `rank`, of the largest of theirs. `InputError` for what is no such adapter, or is not of this model.
        """
        self.places = max(places or 0, len(named))
        self.shapes: dict[str, LowRank] = {}
        self.one: dict[str, LowRank] = {}
        self.first: list[Adapter] = []
        if not self.places:
            return
        self._architecture, self._dtype = config.architecture, np.dtype(dtype)
        on_mesh = config.over_tensor_axis(mesh.shape[TENSOR])
        placed, stored = (adaptable(nnx.merge(*abstract_model(each, dtype))) for each in (on_mesh, config))
        modules = {place: names for place, names in module_names(config, dtype).items() if place in placed}
        self._layers = {place: _Layer(names, placed[place], stored[place]) for place, names in modules.items()}

        self._modules = _modules(self._layers)

        pairs = {name: self._pairs(name, path) for name, path in named.items()}
        self._rank = rank or max(map(_rank, pairs.values()), default=_RANK)
        if self.places == len(named):
            modules_used = {module for own in pairs.values() for module in own}
            self._layers = {
                place: layer for place, layer in self._layers.items() if not modules_used.isdisjoint(layer.names)
            }
        sharding_of = shardings_by_partition(mesh)
        self.shapes, self.one = (
            {place: layer.shapes(count, self._rank, self._dtype, sharding_of) for place, layer in self._layers.items()}
            for count in (self.places, 1)
        )
        self.first = [self._adapter(name, own) for name, own in pairs.items()]

    def read(self, name: str, path: str) -> Adapter:
        """Another one, with the same errors; for any thread."""
        return self._adapter(name, self._pairs(name, path))

    def _pairs(self, name: str, path: str) -> dict[str, Pair]:
        pairs = _read(_directory(name, path))
        if surplus := sorted(pairs.keys() - self._modules):
            raise InputError(
                f"the adapter {name!r} adds to {surplus[0]!r}, which is no linear layer of this "
                f"{self._architecture}; give one that was trained for this model, on its attention and dense MLPs"
            )
        return pairs

    def _adapter(self, name: str, pairs: dict[str, Pair]) -> Adapter:
        if (rank := _rank(pairs)) > self._rank:
            raise InputError(
                f"the adapter {name!r} has rank {rank} and there is memory for {self._rank}; raise max_lora_rank"
            )
        if surplus := sorted(pairs.keys() - _modules(self._layers)):
            raise InputError(
                f"the adapter {name!r} adds to {surplus[0]!r}, and there is memory for layers of the lora_modules "
                "alone; start with a max_loras above their number"
            )
        return Adapter(
            name,
            {
                place: layer.low_rank(name, layer.parts_of(name, pairs), self._rank, self._dtype)
                for place, layer in self._layers.items()
            },
        )


class _Layer:
    """A linear layer as it stands on the mesh, and as a checkpoint has it: of which modules, by their `names` there."""

    def __init__(self, names: list[str], placed: Linear, stored: Linear):
        self.names = names
        self._parts = placed.parts
        rows, self._in = placed.weight.shape[0], placed.in_features
        self._rows = rows_of_parts(rows, placed.parts)
        self._stored_rows = rows_of_parts(stored.weight.shape[0], stored.parts)
        self._partition = placed.weight.get_metadata()["partition"]

    def shapes(
        self, count: int, rank: int, dtype: np.dtype, sharding_of: Callable[[PartitionSpec], NamedSharding]
    ) -> LowRank:
        """Those of so many adapters."""
        out, into = self._partition

        def shape(rows: int, columns: int, partition: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=sharding_of(partition))

        down = shape(len(self._parts) * count * rank, self._in, PartitionSpec(None, into))
        return LowRank(down, tuple(shape(rows, count * rank, PartitionSpec(out, None)) for rows in self._rows))

    def parts_of(self, adapter: str, pairs: dict[str, Pair]) -> list[Pair | None]:
        """What an adapter adds to each part."""
        whole = len(self.names) < len(self._stored_rows)  # the checkpoint has all parts in one module
        heights = [sum(self._stored_rows)] if whole else self._stored_rows
        own = [pairs.get(name) for name in self.names]
        for name, pair, height in zip(self.names, own, heights, strict=True):
            if pair is not None and (pair.down.shape[1], len(pair.up)) != (self._in, height):
                raise InputError(
                    f"the adapter {adapter!r} has {pair.down.shape[1]} inputs and {len(pair.up)} outputs of {name!r}, "
                    f"and this model has {self._in} and {height}; they do not belong together"
                )
        if whole and own[0] is not None:
            ends = np.cumsum(self._stored_rows)[:-1]
            return [Pair(own[0].down, up) for up in np.split(own[0].up, ends)]
        return own * len(self._stored_rows) if whole else own

    def low_rank(self, adapter: str, pairs: list[Pair | None], rank: int, dtype: np.dtype) -> LowRank:
        """What one adapter adds, of its parts."""
        down = np.zeros((len(self._parts), rank, self._in), dtype)
        up = [np.zeros((rows, rank), dtype) for rows in self._rows]
        for part, pair in enumerate(pairs):
            if pair is not None:
                down[part, : len(pair.down)] = pair.down
                blocks = pair.up.reshape(-1, self._parts[part], pair.up.shape[1])
                repeated = np.repeat(blocks, self._rows[part] // len(pair.up), axis=0)  # KV heads, on some meshes
                up[part][:, : len(pair.down)] = repeated.reshape(self._rows[part], -1)
        # Zeros of another adapter's row times these would be NaN.
        if not all(np.isfinite(array).all() for array in (down, *up)):
            raise InputError(
                f"the adapter {adapter!r} has NaN or infinity for {' or '.join(map(repr, self.names))} in "
                f"{dtype.name}, which would reach the requests of others; leave it out or train it again"
            )
        return LowRank(down.reshape(-1, self._in), tuple(up))


def _modules(layers: dict[str, _Layer]) -> set[str]:
    """What a checkpoint calls all that these are made of."""
    return {module for layer in layers.values() for module in layer.names}


def _rank(pairs: dict[str, Pair]) -> int:
    """The largest in an adapter."""
    return max(len(pair.down) for pair in pairs.values())


def _directory(name: str, path: str) -> Path:
    directory = Path(path).expanduser()
    if not directory.exists() and hub.is_hub_id(path):
        return hub.download(path, None, with_weights=True)
    if not directory.is_dir():
        raise InputError(
            f"there is no directory {directory}, which lora_modules gives for the adapter {name!r}; give one that PEFT "
            "saved, or a hub id"
        )
    return directory


def _read(directory: Path) -> dict[str, Pair]:
    """What the adapter in `directory` adds, by the module's name in a checkpoint of the model."""
    settings = _settings(directory / _CONFIG)
    path = directory / _WEIGHTS
    try:
        tensors = map_file(path)
    except FileNotFoundError as error:
        if (directory / _PICKLED).exists():
            raise InputError(
                f"{directory} holds {_PICKLED} and no {_WEIGHTS}, and pickled weights are never opened, since they can "
                "run any program; save the adapter again with a recent PEFT"
            ) from error
        raise InputError(f"{directory} has no {_WEIGHTS}; give a directory that PEFT saved") from error
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise InputError(f"{path} holds {name!r}, which is no part of a product of low rank that could be served")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise InputError(f"{path} holds no tensor; save the adapter again")
    pairs = {}
    for module, own in found.items():
        if own.keys() != {"A", "B"} or len(own["A"]) != own["B"].shape[1]:
            raise InputError(f"{path} has no lora_A and lora_B of {module!r} with one rank; save the adapter again")
        with np.errstate(over="ignore"):  # what becomes too large is refused with what was so
            pairs[module] = Pair(own["A"], own["B"].astype(np.float32) * _scaling(settings, module, len(own["A"])))
    return pairs


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {_CONFIG}; give a directory that PEFT saved") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise InputError(f"{path} has peft_type {kind!r}, and adapters of the type 'LORA' alone are served")
    unserved = sorted(name for name, value in settings.items() if value and name not in _SERVED)
    unserved += ["bias"] * (settings.get("bias", "none") != "none")
    begun = settings.get("init_lora_weights")
    unserved += ["init_lora_weights"] * (isinstance(begun, str) and begun.lower().startswith(_OTHER_BASES))
    if unserved:
        raise InputError(
            f"{path} has {unserved[0]}={settings[unserved[0]]!r}, which is not served; merge the adapter into its "
            "model with PEFT's merge_and_unload, or train one without"
        )
    return settings


def _scaling(settings: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies `up @ down` by; `alpha_pattern`'s keys are expressions for the ends of modules' names."""
    alphas = settings.get("alpha_pattern") or {}
    try:
        own = [alpha for pattern, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)]
        alpha = float((own or [settings["lora_alpha"]])[0])
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise InputError(
            f"{_CONFIG} gives no number for {module!r} in lora_alpha and alpha_pattern ({error}); correct it"
        ) from error
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
