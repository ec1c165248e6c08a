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

_GPT_OSS = _COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 331,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "attention_bias": True,
    # Small enough that gates and ups reach it.
    "swiglu_limit": 1.5,
    "rope_theta": 1000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
_DEEPSEEK = _COMMON | {
    "num_hidden_layers": 3,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 331,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 18,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
}
_DEEPSEEK_V2 = _DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
_DEEPSEEK_V3 = _DEEPSEEK | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
_DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 32,
    "beta_fast": 8,
    "beta_slow": 1,
}

MOE_CASES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL,
    "mixtral-window": _MIXTRAL | {"num_experts_per_tok": 1, "sliding_window": 11, "rope_theta": 1_000_000.0},
    "qwen3-moe": _QWEN3_MOE,
    "qwen3-moe-dense-layers-unnormalised": _QWEN3_MOE
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False},
    "gpt-oss-mxfp4": _GPT_OSS
    | {
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        }
    },
    "gpt-oss": _GPT_OSS,
    "deepseek-v2-lite": _DEEPSEEK_V2
    | {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "rope_scaling": _DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.9},
    },
    "deepseek-v2": _DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "deepseek-v3": _DEEPSEEK_V3
    | {
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "rope_scaling": _DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek-v3-half-split-rope": _DEEPSEEK_V3 | {"rope_interleave": False, "n_group": 1, "topk_group": 1},
}


def moe_shapes(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    """The tensors of layer `index` that are neither attention's nor norms, under HuggingFace's names within a layer."""
    hidden, kind = config["hidden_size"], config["model_type"]
    if kind == "mixtral":
        moe, experts, width = "block_sparse_moe", config["num_local_experts"], config["intermediate_size"]
        shapes = {f"{moe}.gate.weight": (experts, hidden)}
        for expert in range(experts):
            shapes |= _gated(f"{moe}.experts.{expert}", ("w1", "w3", "w2"), width, hidden)
        return shapes
    if kind == "gpt_oss":
        return _gpt_oss_shapes(config)
    projections = ("gate_proj", "up_proj", "down_proj")
    plain = index in config.get("mlp_only_layers", ()) or (index + 1) % config.get("decoder_sparse_step", 1)
    if plain or index < config.get("first_k_dense_replace", 0):
        return _gated("mlp", projections, config["intermediate_size"], hidden)
    experts, width = config.get("num_experts") or config["n_routed_experts"], config["moe_intermediate_size"]
    shapes = {"mlp.gate.weight": (experts, hidden)}
    if kind == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    if "n_shared_experts" in config:
        shapes |= _gated("mlp.shared_experts", projections, config["n_shared_experts"] * width, hidden)
    for expert in range(experts):
        shapes |= _gated(f"mlp.experts.{expert}", projections, width, hidden)
    return shapes


def latent_attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of DeepSeek's attention, under HuggingFace's names within a layer."""
    hidden, heads, q_rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    rank, nope, rope, value = (
        config[name] for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    q_rows = heads * (nope + rope)
    shapes: dict[str, tuple[int, ...]] = {"q_proj.weight": (q_rows, hidden)}
    if q_rank:
        shapes = {"q_a_proj.weight": (q_rank, hidden), "q_a_layernorm.weight": (q_rank,)}
        shapes["q_b_proj.weight"] = (q_rows, q_rank)
    shapes |= {
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _gpt_oss_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes: dict[str, tuple[int, ...]] = {"mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,)}
    for name, ins, outs in (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden)):
        shapes[f"mlp.experts.{name}_bias"] = (experts, outs)
        if "quantization_config" in config:
            shapes[f"mlp.experts.{name}_blocks"] = (experts, outs, ins // 32, 16)
            shapes[f"mlp.experts.{name}_scales"] = (experts, outs, ins // 32)
        else:
            shapes[f"mlp.experts.{name}"] = (experts, ins, outs)
    return shapes


def _gated(module: str, names: tuple[str, str, str], width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{module}.{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
