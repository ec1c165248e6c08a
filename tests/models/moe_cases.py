"""Tiny mixtures of experts, and the tensors of their checkpoints. Needs nothing but Python."""

from typing import Any

_COMMON = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
_MIXTRAL = _COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 331,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
_QWEN3_MOE = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 80,
    "intermediate_size": 144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 331,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}

MOE_CASES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL,
    "mixtral-window": _MIXTRAL | {"num_experts_per_tok": 1, "sliding_window": 11, "rope_theta": 1_000_000.0},
    "qwen3-moe": _QWEN3_MOE,
    "qwen3-moe-dense-layers-unnormalised": _QWEN3_MOE
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False},
}


def feed_forward_shapes(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    """The tensors of layer `index` of a case that are neither attention's nor norms, under HuggingFace's names."""
    hidden, kind = config["hidden_size"], config["model_type"]
    layer = f"model.layers.{index}"
    if kind == "mixtral":
        moe, experts, width = f"{layer}.block_sparse_moe", config["num_local_experts"], config["intermediate_size"]
        shapes = {f"{moe}.gate.weight": (experts, hidden)}
        for expert in range(experts):
            shapes |= _gated(f"{moe}.experts.{expert}", ("w1", "w3", "w2"), width, hidden)
        return shapes
    projections = ("gate_proj", "up_proj", "down_proj")
    if index in config.get("mlp_only_layers", ()) or (index + 1) % config.get("decoder_sparse_step", 1):
        return _gated(f"{layer}.mlp", projections, config["intermediate_size"], hidden)
    shapes = {f"{layer}.mlp.gate.weight": (config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        shapes |= _gated(f"{layer}.mlp.experts.{expert}", projections, config["moe_intermediate_size"], hidden)
    return shapes


def _gated(module: str, names: tuple[str, str, str], width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{module}.{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
