"""Rope parameters as published models have them, and what `transformers` makes of them."""

from typing import Any, NamedTuple


class RopeCase(NamedTuple):
    parameters: dict[str, Any]
    head_dim: int
    max_position_embeddings: int
    longest: int  # the length that is served


_LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DEEPSEEK = {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_GPT_OSS = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
_PHI = {
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.02 * pair for pair in range(48)],
    "long_factor": [1.0 + 1.3 * pair for pair in range(48)],
}

ROPES = {
    "linear": RopeCase({"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, 256, 131072, 131072),
    "dynamic-within": RopeCase({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 128, 2048, 1024),
    "dynamic-beyond": RopeCase({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 128, 2048, 5000),
    "llama-3.1": RopeCase({"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA_3_1}, 128, 131072, 131072),
    "qwen3-yarn": RopeCase(
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        *(128, 131072, 131072),
    ),
    "olmo3-yarn-attention-factor": RopeCase(
        {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836,
        },
        *(128, 65536, 65536),
    ),
    "gpt-oss-yarn-not-truncated": RopeCase(
        {"rope_type": "yarn", "rope_theta": 15e4, "truncate": False, **_GPT_OSS}, 64, 131072, 131072
    ),
    "deepseek-yarn-mscale": RopeCase(
        {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0, **_DEEPSEEK},
        *(64, 163840, 163840),
    ),
    "deepseek-v2-lite-yarn-two-mscales": RopeCase(
        {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 0.5, **_DEEPSEEK},
        *(64, 163840, 163840),
    ),
    "yarn-that-stretches-nothing": RopeCase(
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0, "original_max_position_embeddings": 2048},
        *(64, 2048, 2048),
    ),
    "phi-longrope-served-short": RopeCase({"rope_type": "longrope", "rope_theta": 1e4, **_PHI}, 96, 131072, 4096),
    "phi-longrope-served-long": RopeCase({"rope_type": "longrope", "rope_theta": 1e4, **_PHI}, 96, 131072, 4097),
    "phi-4-mini-partial-longrope": RopeCase(
        {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 32.0, **_PHI},
        *(128, 131072, 131072),
    ),
}


def live_rope(name: str) -> tuple[Any, float]:
    """Inverse frequencies `[rotary_dim / 2]` and the attention factor. Needs PyTorch."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    case = ROPES[name]
    config = LlamaConfig(
        hidden_size=4 * case.head_dim,
        num_attention_heads=4,
        head_dim=case.head_dim,
        max_position_embeddings=case.max_position_embeddings,
        rope_parameters=dict(case.parameters),
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[case.parameters["rope_type"]](config, "cpu", seq_len=case.longest)
    return frequencies.numpy(), factor
