"""Adapters as PEFT saves them, with random numbers, and checkpoints into which they are merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(
    directory: Path, checkpoint: Path, modules: tuple[str, ...] = ATTENTION + MLP, *, seed: int = 0, **settings: Any
) -> Path:
    """Add to those modules of all layers of `checkpoint`; `settings` are those of adapter_config.json."""
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False} | settings
    random = np.random.default_rng(seed)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(modules):
            out, into = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = random.standard_normal((settings["r"], into)).astype(np.float32) / 8
            tensors[f"{stem}.lora_B.weight"] = random.standard_normal((out, settings["r"])).astype(np.float32) / 8
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(settings))
    return directory


def change_adapter(directory: Path, config: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Path:
    """Replace or add fields of the config and tensors; None removes a tensor."""
    settings = json.loads((directory / CONFIG).read_text()) | (config or {})
    (directory / CONFIG).write_text(json.dumps(settings))
    changed = load_file(directory / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, directory / WEIGHTS)
    return directory


def merged(checkpoint: Path, adapter: Path, into: Path, *, scaling: float) -> Path:
    """`checkpoint` with `scaling` times the products of `adapter` added to its weights."""
    shutil.copytree(checkpoint, into)
    weights, added = load_file(checkpoint / "model.safetensors"), load_file(adapter / WEIGHTS)
    for name in added:
        if name.endswith("lora_A.weight"):
            stem = name.removesuffix("lora_A.weight")
            product = added[f"{stem}lora_B.weight"].astype(np.float64) @ added[name].astype(np.float64)
            weights[f"{stem.removeprefix('base_model.model.')}weight"] += (scaling * product).astype(np.float32)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into
