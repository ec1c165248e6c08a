"""Every field of a family's config is read, or known to change nothing that is computed here."""

from typing import Any

import pytest

from jaxserve.models.registry import ARCHITECTURES, model_config
from tests.models.test_moe_sizes import FAMILIES as MOE_FAMILIES
from tests.models.test_published_sizes import FAMILIES

NEEDED = {"DeepseekV2ForCausalLM": {"num_experts_per_tok": 6}}  # what a family gives no default for

CHANGES_NOTHING = {
    # about the file
    *("transformers_version", "architectures", "dtype", "_name_or_path", "model_type"),
    # what `transformers` gives back, and tasks other than generation
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type"),
    # training
    *("initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "pretraining_tp"),
    *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits"),
    # tokens, read where requests are
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    # `transformers` has put these into layer_types, no_rope_layers and rope_parameters
    *("use_sliding_window", "max_window_layers", "_sliding_window_pattern", "no_rope_layer_interval"),
    "original_max_position_embeddings",
    "qk_head_dim",  # `transformers` computes it from its two parts
}


class Recorded(dict):
    """A config that remembers which of its fields were read."""

    def __init__(self, fields: dict[str, Any], read: set[str]):
        super().__init__(fields)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __or__(self, others: dict[str, Any]) -> "Recorded":
        return Recorded(dict(self) | others, self.read)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field_is_read_or_changes_nothing(architecture: str) -> None:
    from transformers import CONFIG_MAPPING

    kind = (FAMILIES | MOE_FAMILIES)[architecture]
    fields = CONFIG_MAPPING[kind](**NEEDED.get(architecture, {})).to_dict() | {"architectures": [architecture]}
    hf = Recorded(fields, set())
    model_config(hf)
    assert fields.keys() - hf.read - CHANGES_NOTHING == set()
    assert not hf.read & CHANGES_NOTHING - {"architectures"}
