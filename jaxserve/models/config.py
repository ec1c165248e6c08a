"""What a decoder is made of, free of any checkpoint format."""

import dataclasses

from jaxserve.errors import InputError
from jaxserve.layers.mlp import gate_up_block
from jaxserve.layers.rotary import RopeConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer: grouped-query attention and a gated MLP in every layer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_repeats: int = 1  # how many neighbouring KV heads are one of the checkpoint's

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}: "
                "grouped-query attention needs whole groups"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} is odd: rotary embeddings rotate pairs of numbers")

    def over_tensor_axis(self, devices: int) -> "ModelConfig":
        """This model on a tensor axis of that many devices: KV heads fewer than devices are repeated, one each."""
        if not self._splits_over(devices):
            raise InputError(
                f"tensor_parallel_size={devices} does not split this model ({self.num_heads} attention heads, "
                f"{self.num_kv_heads} KV heads, MLP width {self.intermediate_size}); possible sizes are "
                f"{', '.join(str(n) for n in range(1, self.num_heads + 1) if self._splits_over(n))}"
            )
        num_kv_heads = max(self.num_kv_heads, devices)
        return dataclasses.replace(self, num_kv_heads=num_kv_heads, kv_repeats=num_kv_heads // self.num_kv_heads)

    @property
    def stored(self) -> "ModelConfig":
        """This model as a checkpoint has it, each KV head once."""
        return dataclasses.replace(self, num_kv_heads=self.num_kv_heads // self.kv_repeats, kv_repeats=1)

    def _splits_over(self, devices: int) -> bool:
        heads = self.num_heads % devices == 0
        kv_heads = self.num_kv_heads % devices == 0 or devices % self.num_kv_heads == 0
        blocks = self.intermediate_size // gate_up_block(self.intermediate_size)
        return heads and kv_heads and blocks % devices == 0
