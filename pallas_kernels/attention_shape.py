"""What an attention kernel is asked to take, as far as its choice depends on it."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Sizes on one device."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    dtype: str  # of queries and pages alike
    queries: int = 1  # a row's, in decode attention
