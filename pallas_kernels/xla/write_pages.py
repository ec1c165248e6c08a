"""Writing new keys and values into their pages."""

import jax


def write_pages(pages: jax.Array, values: jax.Array, page_ids: jax.Array, offsets: jax.Array) -> jax.Array:
    """`pages` `[pages, kv_heads, page_size, head_dim]` with `values` `[tokens, kv_heads, head_dim]` in place.

    Token `t` goes to `offsets[t]` of page `page_ids[t]` (both int32 `[tokens]`, no two tokens to one place); a page id
    outside the pool drops its token, which is how padding is kept out. In place where `pages` is donated.
    """
    return pages.at[page_ids, :, offsets].set(values.astype(pages.dtype), mode="drop", unique_indices=True)
