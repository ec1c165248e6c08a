"""What attention is asked to take, as far as the choice of a kernel depends on it."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Sizes on one device."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    dtype: str  # of queries and pages
    queries: int = 1  # a row's, in decode attention
    tile_size: int = 0  # of prefill attention
