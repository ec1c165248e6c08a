"""Tiny models of every supported family and shape, as HuggingFace directories with reproducible random weights.

Needs numpy and safetensors only, so that an environment with PyTorch and no JAX can use it too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.models.moe_cases import MOE_CASES, feed_forward_shapes, latent_attention_shapes

PROMPT_LENGTHS = (5, 17, 40)

_COMMON = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA = _COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10_000.0}
_QWEN2 = _COMMON | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1_000_000.0}
_QWEN3 = _COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1_000_000.0}
# Wavelengths below 8 positions are kept, those above 32 stretched: both and the blend between lie within a prompt.
_LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _shape(hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, head_dim: int | None = None) -> dict:
    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }
    return shape | ({} if head_dim is None else {"head_dim": head_dim})


# Each name's config.json. Rope is spelled in every way that checkpoints spell it.
CASES: dict[str, dict[str, Any]] = {
    "llama-2": _LLAMA | _shape(128, 200, heads=2, kv_heads=2, vocab=331),
    "llama-3-group-3-head-80": _LLAMA
    | _shape(96, 136, heads=6, kv_heads=2, head_dim=80, vocab=517)
    | {"rope_theta": 500_000.0},
    "llama-3.1-scaled-rope": _LLAMA
    | _shape(64, 144, heads=4, kv_heads=2, head_dim=64, vocab=331)
    | {"num_hidden_layers": 3, "rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3"} | _LLAMA3_SCALING},
    "llama-3.2-tied": _LLAMA
    | _shape(160, 216, heads=2, kv_heads=1, head_dim=64, vocab=517)
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0} | _LLAMA3_SCALING,
    },
    "llama-linear-rope": _LLAMA
    | _shape(128, 184, heads=2, kv_heads=1, vocab=331)
    | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2-group-8-head-64": _QWEN2 | _shape(72, 136, heads=8, kv_heads=1, head_dim=64, vocab=517),
    "qwen2.5-tied": _QWEN2 | _shape(128, 208, heads=2, kv_heads=1, vocab=331) | {"tie_word_embeddings": True},
    "qwen3-group-3-head-128": _QWEN3
    | _shape(80, 152, heads=3, kv_heads=1, head_dim=128, vocab=331)
    | {"num_hidden_layers": 3},
    "qwen3-tied-group-8-head-64": _QWEN3
    | _shape(72, 192, heads=16, kv_heads=2, head_dim=64, vocab=517)
    | {"tie_word_embeddings": True},
    **MOE_CASES,
}


def prompts(case: str) -> list[list[int]]:
    """Token ids of a prompt of each of `PROMPT_LENGTHS`."""
    random = np.random.RandomState(1)
    return [random.randint(CASES[case]["vocab_size"], size=length).tolist() for length in PROMPT_LENGTHS]


def write_checkpoint(case: str, directory: Path, *, seed: int = 0, shards: int = 1) -> Path:
    """Write the case's config.json and weights, over `shards` safetensors files, to `directory`; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CASES[case], indent=2))
    tensors = make_tensors(case, seed)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def make_tensors(case: str, seed: int) -> dict[str, np.ndarray]:
    """Float32 weights whose logits are of order one to ten and depend on every tensor and on earlier tokens."""
    random = np.random.RandomState(seed)  # the generator whose stream numpy promises never to change

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("_blocks"):
            return random.randint(256, size=shape, dtype=np.uint8)
        if name.endswith("_scales"):  # of numbers whose mean square is some 9: powers of two from 1/64 to 1/16
            return random.randint(127 - 6, 127 - 3, size=shape, dtype=np.uint8)
        values = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif name.endswith(("bias", "sinks")):
            values *= 0.3
        elif "embed_tokens" in name:  # small beside what the layers add: a tied model would repeat its last token
            values *= 0.1
        else:
            gain = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0}.get(name.split(".")[-2], 1.0)
            values *= gain / np.sqrt(
                shape[-2] if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else shape[-1]
            )
        return values.astype(np.float32)

    return {name: draw(name, shape) for name, shape in _tensor_shapes(CASES[case]).items()}


def _tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `config` holds, under HuggingFace's name."""
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        if "kv_lora_rank" in config:
            shapes |= latent_attention_shapes(config, index)
        else:
            shapes |= _attention_shapes(config, f"{layer}.self_attn")
        if "num_experts_per_tok" in config:
            shapes |= feed_forward_shapes(config, index)
        else:
            shapes[f"{layer}.mlp.gate_proj.weight"] = (intermediate, hidden)
            shapes[f"{layer}.mlp.up_proj.weight"] = (intermediate, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(config: dict[str, Any], attention: str) -> dict[str, tuple[int, ...]]:
    hidden, heads, kv_heads = (config[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    kind, head_dim = config["model_type"], config.get("head_dim", hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {}
    for projection, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
        shapes[f"{attention}.{projection}_proj.weight"] = (rows, hidden)
        if kind in ("qwen2", "gpt_oss"):
            shapes[f"{attention}.{projection}_proj.bias"] = (rows,)
    if kind in ("qwen3", "qwen3_moe"):
        shapes |= {f"{attention}.{which}_norm.weight": (head_dim,) for which in "qk"}
    shapes[f"{attention}.o_proj.weight"] = (hidden, heads * head_dim)
    if kind == "gpt_oss":
        shapes |= {f"{attention}.o_proj.bias": (hidden,), f"{attention}.sinks": (heads,)}
    return shapes
