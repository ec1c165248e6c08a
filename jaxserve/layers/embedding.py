"""Token embeddings and the output layer, which tied models share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import split_matmul_nk

VOCAB_MULTIPLE = 128  # any vocabulary then splits over any mesh, and the output layer's tiles are whole


def padded_vocab(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Embedding(nnx.Module):
    """A table `[padded vocabulary, hidden]`, split over the vocabulary. It maps tokens to vectors or vectors to logits.

    A checkpoint holds the first `vocab_size` rows; no token reads the others and no logit comes from them.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        table = nnx.initializers.normal(0.02)(rngs.params(), (padded_vocab(vocab_size), hidden_size), dtype)
        self.weight = nnx.Param(table, partition=PartitionSpec("tensor", None), parts=(vocab_size,))
        self.vocab_size = vocab_size

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """int32 `[...]` to `[..., hidden]`."""
        return self.weight[...][token_ids]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., hidden]` to float32 `[..., vocab]`."""
        logits = split_matmul_nk(hidden, self.weight[...], self.weight.get_metadata()["partition"])
        return logits[..., : self.vocab_size]
