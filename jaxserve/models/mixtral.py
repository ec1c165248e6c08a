"""Mixtral: Llama's attention, and a mixture of experts in every layer.

Jiang et al., 2024, arXiv:2401.04088.
"""

from typing import Any, ClassVar

from jaxserve.layers.moe import ExpertsConfig, RouterConfig
from jaxserve.models.hf_config import decoder_config, require, uniform_layer_types
from jaxserve.models.moe import MoEConfig, MoEDecoder

_MOE = "model.layers.{}.block_sparse_moe"


class MixtralForCausalLM(MoEDecoder):
    HF_NAMES: ClassVar = MoEDecoder.HF_NAMES | {
        "layers.{}.moe.router": (f"{_MOE}.gate",),
        "layers.{}.moe.gate_up": (f"{_MOE}.experts.{{{{}}}}.w1", f"{_MOE}.experts.{{{{}}}}.w3"),
        "layers.{}.moe.down": (f"{_MOE}.experts.{{{{}}}}.w2",),
    }

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> MoEConfig:
        require(cls.__name__, hf, hidden_act=("silu",))
        return decoder_config(
            cls.__name__,
            hf,
            of=MoEConfig,
            layer_types=uniform_layer_types(hf),
            router=RouterConfig(num_experts=hf["num_local_experts"], experts_per_token=hf["num_experts_per_tok"]),
            experts=ExpertsConfig(width=hf["intermediate_size"]),
        )
