"""One matrix product per group of rows, in plain XLA: what a mixture of experts is made of."""

import jax
import jax.numpy as jnp

_MIN_TILE, _MAX_TILE = 8, 128


def grouped_matmul(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`x` `[tokens, in]` times `weights` `[groups, out, in]` transposed, each row with its own group's weight.

    `x` is sorted by group: the first `group_sizes[0]` rows are of group 0, and so on; `group_sizes` int32 `[groups]`
    sums to at most `tokens`. Returns `[tokens, out]` in `x`'s dtype, accumulated in float32; zeros for rows that are
    in no group. Only groups that have rows are read and computed.
    """
    tokens, _ = x.shape
    groups, out_features, _ = weights.shape
    # As many rows as a group has on average, within limits: a tile that is too large multiplies others' rows in vain,
    # one that is too small reads its group's weight again and again.
    tile = min(max(_MIN_TILE, 1 << (-(-tokens // groups) - 1).bit_length()), _MAX_TILE)
    ends = jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // tile)
    tile_ends = jnp.cumsum(tiles)
    x_padded = jnp.pad(x, ((0, tile), (0, 0)))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # not TF32

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.sum(tile_ends <= index)
        start = ends[group] - group_sizes[group] + (index - (tile_ends[group] - tiles[group])) * tile
        rows = jax.lax.dynamic_slice_in_dim(x_padded, start, tile)
        weight = jax.lax.dynamic_index_in_dim(weights, group, keepdims=False)
        contract = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(rows, weight, contract, precision=precision, preferred_element_type=jnp.float32)
        # What a group's last tile computes of the rows behind it, the tiles that follow write over.
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, axis=0)

    out = jnp.zeros((tokens + tile, out_features), x.dtype)
    out = jax.lax.fori_loop(0, tile_ends[-1], one_tile, out)[:tokens]
    return jnp.where(jnp.arange(tokens)[:, None] < ends[-1], out, 0)
