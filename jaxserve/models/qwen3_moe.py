"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in every layer or in some."""

from typing import Any

from jaxserve.layers.moe import ExpertsConfig, RouterConfig
from jaxserve.models.hf_config import decoder_config, require, uniform_layer_types
from jaxserve.models.moe import MoEConfig, MoEDecoder


class Qwen3MoeForCausalLM(MoEDecoder):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> MoEConfig:
        require(cls.__name__, hf, hidden_act=("silu",))
        step, plain = hf["decoder_sparse_step"], hf["mlp_only_layers"] or ()
        return decoder_config(
            cls.__name__,
            hf,
            of=MoEConfig,
            layer_types=uniform_layer_types(hf),
            qk_norm=True,
            router=RouterConfig(
                num_experts=hf["num_local_experts"],
                experts_per_token=hf["num_experts_per_tok"],
                normalised=hf["norm_topk_prob"],
            ),
            experts=ExpertsConfig(width=hf["moe_intermediate_size"]),
            dense_layers=frozenset(i for i in range(hf["num_hidden_layers"]) if i in plain or (i + 1) % step),
        )
