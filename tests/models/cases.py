"""Tiny models of every supported family and shape, as HuggingFace directories with reproducible random weights.

Needs numpy and safetensors only, so that an environment with PyTorch and no JAX can use it too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.models.moe_cases import MOE_CASES, latent_attention_shapes, moe_shapes

PROMPT_LENGTHS = (5, 17, 40)
MAX_MODEL_LEN = 64  # the longest prompt and its completion

_COMMON = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,  # families' own is beyond a small vocabulary
}
_LLAMA = _COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10_000.0}
_QWEN2 = _COMMON | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1_000_000.0}
_QWEN3 = _COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1_000_000.0}
_MISTRAL = _COMMON | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 10_000.0}
_MINISTRAL = _COMMON | {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "rope_theta": 1_000_000.0}
_GEMMA = _COMMON | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "num_hidden_layers": 3}
_GEMMA2 = _GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "rope_theta": 10_000.0}
_GEMMA3 = _GEMMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rope_theta": 1_000_000.0}
_PHI3 = _COMMON | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_theta": 10_000.0}
_OLMO2 = _COMMON | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_theta": 500_000.0}
_OLMO3 = _COMMON | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "rope_theta": 500_000.0}
_GRANITE = _COMMON | {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "rope_theta": 10_000.0}
_SMOLLM3 = _COMMON | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "rope_theta": 2_000_000.0}
_GLM4 = _COMMON | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "rope_theta": 10_000.0}
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


def _longrope_factors(pairs: int) -> dict[str, list[float]]:
    return {
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.0 + 0.7 * pair for pair in range(pairs)],
    }


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
    "llama-yarn-rope": _LLAMA
    | _shape(80, 136, heads=4, kv_heads=1, head_dim=32, vocab=331)
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama-dynamic-rope": _LLAMA
    | _shape(80, 136, heads=4, kv_heads=1, head_dim=32, vocab=331)
    | {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "qwen2-sliding-upper-layers": _QWEN2
    | _shape(72, 136, heads=4, kv_heads=2, head_dim=24, vocab=331)
    | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    "mistral-window": _MISTRAL | _shape(104, 152, heads=4, kv_heads=2, vocab=331) | {"sliding_window": 11},
    "mistral-nemo": _MISTRAL | _shape(72, 136, heads=4, kv_heads=4, head_dim=40, vocab=331) | {"sliding_window": None},
    "ministral": _MINISTRAL
    | _shape(88, 144, heads=8, kv_heads=2, head_dim=24, vocab=331)
    | {
        "num_hidden_layers": 4,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma-2": _GEMMA2
    | _shape(72, 136, heads=4, kv_heads=2, head_dim=40, vocab=331)
    | {
        "tie_word_embeddings": False,  # published ones are tied, which hides the logits' soft-cap
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma-2-tied-uncapped": _GEMMA2
    | _shape(96, 152, heads=4, kv_heads=4, head_dim=24, vocab=331)
    | {
        "sliding_window": 33,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma-3": _GEMMA3
    | _shape(72, 136, heads=4, kv_heads=2, head_dim=40, vocab=331)
    | {
        "sliding_window": 10,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi-3-window": _PHI3 | _shape(96, 136, heads=4, kv_heads=4, vocab=331) | {"sliding_window": 13},
    "phi-4-partial-long-rope": _PHI3
    | _shape(128, 152, heads=4, kv_heads=2, vocab=331)
    | {
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4,
        "rope_scaling": {"type": "longrope", **_longrope_factors(12)},
    },
    "phi-3-longrope-served-short": _PHI3
    | _shape(128, 152, heads=4, kv_heads=1, vocab=331)
    | {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **_longrope_factors(16)},
    },
    "olmo-2": _OLMO2 | _shape(104, 152, heads=4, kv_heads=4, vocab=331),
    "olmo-3": _OLMO3
    | _shape(72, 136, heads=8, kv_heads=4, head_dim=24, vocab=331)
    | {
        "num_hidden_layers": 4,
        "sliding_window": 9,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
    },
    "granite-3": _GRANITE
    | _shape(104, 152, heads=4, kv_heads=2, vocab=331)
    | {
        "tie_word_embeddings": True,
        "embedding_multiplier": 1.7,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
    },
    "smollm-3": _SMOLLM3
    | _shape(88, 144, heads=4, kv_heads=2, head_dim=32, vocab=331)
    | {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "glm-4": _GLM4
    | _shape(88, 144, heads=8, kv_heads=2, head_dim=24, vocab=331)
    | {"attention_bias": True, "partial_rotary_factor": 0.5},
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
            values = ("gemma" not in CASES[case]["model_type"]) + 0.3 * values  # Gemma's norms add the one themselves
        elif name.endswith(("bias", "sinks")):
            values *= 0.3
        elif "embed_tokens" in name:  # small beside what the layers add: a tied model would repeat its last token
            values *= 0.03 if "gemma" in CASES[case]["model_type"] else 0.1  # Gemma multiplies it again
        else:
            gain = {"q_proj": 1.5, "k_proj": 1.5, "qkv_proj": 1.4, "lm_head": 3.0}.get(name.split(".")[-2], 1.0)
            transposed = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
            values *= gain / np.sqrt(shape[-2] if transposed else shape[-1])
        return values.astype(np.float32)

    return {name: draw(name, shape) for name, shape in _tensor_shapes(CASES[case]).items()}


def _tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `config` holds, under HuggingFace's name."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = latent_attention_shapes(config) if "kv_lora_rank" in config else _attention_shapes(config)
        layer |= moe_shapes(config, index) if "num_experts_per_tok" in config else _mlp_shapes(config)
        layer |= {f"{norm}_layernorm.weight": (hidden,) for norm in _NORMS.get(config["model_type"], _LLAMA_NORMS)}
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


_LLAMA_NORMS = ("input", "post_attention")
_NORMS = {
    "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "gemma3_text": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "olmo2": ("post_attention", "post_feedforward"),
    "olmo3": ("post_attention", "post_feedforward"),
    "glm4": ("input", "post_self_attn", "post_attention", "post_mlp"),
}


def _attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kind, hidden = config["model_type"], config["hidden_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    o_proj: dict[str, tuple[int, ...]] = {"self_attn.o_proj.weight": (hidden, q_rows)}
    if kind == "gpt_oss":
        o_proj |= {"self_attn.o_proj.bias": (hidden,), "self_attn.sinks": (config["num_attention_heads"],)}
    if kind == "phi3":
        return {"self_attn.qkv_proj.weight": (q_rows + 2 * kv_rows, hidden)} | o_proj
    shapes: dict[str, tuple[int, ...]] = {}
    for projection, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"self_attn.{projection}_proj.weight"] = (rows, hidden)
        if kind in ("qwen2", "glm4", "gpt_oss"):
            shapes[f"self_attn.{projection}_proj.bias"] = (rows,)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        shapes |= {f"self_attn.{which}_norm.weight": (head_dim,) for which in "qk"}
    if kind in ("olmo2", "olmo3"):
        shapes |= {"self_attn.q_norm.weight": (q_rows,), "self_attn.k_norm.weight": (kv_rows,)}
    return shapes | o_proj


def _mlp_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    down = {"mlp.down_proj.weight": (hidden, intermediate)}
    if config["model_type"] in ("phi3", "glm4"):
        return {"mlp.gate_up_proj.weight": (2 * intermediate, hidden)} | down
    return {f"mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")} | down
