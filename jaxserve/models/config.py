"""What a decoder is made of, free of any checkpoint format."""

import dataclasses
import math
from typing import ClassVar, Self

from jaxserve.errors import InputError
from jaxserve.layers.embedding import padded_vocab
from jaxserve.layers.mlp import gate_up_block
from jaxserve.layers.quantisation import INT4
from jaxserve.layers.rotary import RopeConfig


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the layers of one model may differ in."""

    rope: RopeConfig | None = RopeConfig()  # None: the layer is told no positions
    window: int | None = None  # how many positions a query sees, its own among them; None: all


@dataclasses.dataclass(frozen=True)
class Fp8Blocks:
    """FP8 with a scale for every block of so many rows and columns."""

    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class PackedIntegers:
    """Integers packed into 32 bits, with a scale for each group of so many of a row, or for all (None)."""

    layout: str  # gptq, awq or compressed-tensors
    bits: int
    group_size: int | None
    zero_offset: int = 0  # what is added to zeros as they are stored
    uniform: bool = True  # all linear layers are so, and groups are of neighbours

    @property
    def is_int4(self) -> bool:
        """Whether the numbers are served as they are."""
        return self.bits == 4 and self.uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer: grouped-query attention and a gated MLP in every layer.

    A family that needs to know more extends it, in its own file.
    """

    of_linear_layers: ClassVar[bool] = True  # whether those have all of its weights, but for embeddings and norms

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]  # one for each layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    activation: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_repeats: int = 1  # how many neighbouring KV heads are one of the checkpoint's
    unused_tensors: tuple[str, ...] = ()  # what the names of tensors begin with that a checkpoint has beyond the model
    attention_scale: float | None = None  # of scores, before the softmax; None: head_dim ** -0.5
    quantization: str | None = None  # of the linear layers' weights: one of `layers.quantisation.KINDS`
    packing: Fp8Blocks | PackedIntegers | None = (
        None  # of a checkpoint's weights, unpacked as they are read unless kept
    )
    tensor_devices: int = 1  # that this model is split over

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def key_dim(self) -> int:
        """Numbers of a KV head's key in the cache."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Numbers of a KV head's value in the cache; 0 if values are the first numbers of the keys."""
        return self.head_dim

    @property
    def keeps_packing(self) -> bool:
        """Whether the linear layers' weights are the very numbers that the checkpoint has packed."""
        return self.quantization == INT4 and isinstance(self.packing, PackedIntegers) and self.packing.is_int4

    def stored_group(self, in_features: int) -> int | None:
        """How many neighbours in a row of so many share a scale in the checkpoint; None if its numbers are not kept."""
        if not (self.keeps_packing and isinstance(self.packing, PackedIntegers)):
            return None
        return self.packing.group_size or in_features

    @property
    def mlp_numbers(self) -> int:
        """How many numbers a feed-forward layer holds of one token at most."""
        return 3 * self.intermediate_size

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}: "
                "grouped-query attention needs whole groups"
            )
        for rope in dict.fromkeys(kind.rope for kind in self.layer_kinds):
            if rope is not None:
                self._check(rope)

    def _check(self, rope: RopeConfig) -> None:
        rotary_dim = rope.rotary_dim(self.head_dim)
        if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim:
            raise InputError(
                f"head_dim={self.head_dim} with partial_rotary_factor={rope.partial_rotary_factor} would rotate "
                f"{rotary_dim} numbers: rotary embeddings rotate pairs of a head's numbers"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope, name)
            if rope.kind == "longrope" and len(factors) != rotary_dim // 2:
                raise InputError(
                    f"{name} has {len(factors)} numbers and heads of {self.head_dim} have {rotary_dim // 2} rotated "
                    "pairs; give one for each"
                )

    def served_up_to(self, length: int) -> Self:
        """This model as it serves sequences of `length` tokens at most, which some kinds of rope depend on."""
        kinds = (
            kind
            if kind.rope is None
            else dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, longest=length))
            for kind in self.layer_kinds
        )
        return dataclasses.replace(self, layer_kinds=tuple(kinds))

    def over_tensor_axis(self, devices: int) -> Self:
        """This model on a tensor axis of that many devices: KV heads are repeated until each has as many."""
        if not self.splits_over(devices):
            raise InputError(
                f"tensor_parallel_size={devices} does not split this model ({self.num_heads} attention heads, "
                f"{self.num_kv_heads} KV heads, {self.widths}, vocabulary padded to "
                f"{padded_vocab(self.vocab_size)}); possible sizes are "
                f"{', '.join(str(n) for n in range(1, self.num_heads + 1) if self.splits_over(n))}"
            )
        num_kv_heads = math.lcm(self.num_kv_heads, devices)
        return dataclasses.replace(
            self,
            num_kv_heads=num_kv_heads,
            kv_repeats=num_kv_heads // self.num_kv_heads,
            tensor_devices=devices,
        )

    @property
    def stored(self) -> Self:
        """This model as a checkpoint has it, each KV head once."""
        return dataclasses.replace(self, num_kv_heads=self.num_kv_heads // self.kv_repeats, kv_repeats=1)

    @property
    def widths(self) -> str:
        """Of the feed-forward layers, for people."""
        return f"MLP width {self.intermediate_size}"

    def splits_over(self, devices: int) -> bool:
        """Whether each of so many devices gets a whole share of everything that is split."""
        blocks = self.intermediate_size // gate_up_block(self.intermediate_size)
        return not any(size % devices for size in (self.num_heads, blocks, padded_vocab(self.vocab_size)))
