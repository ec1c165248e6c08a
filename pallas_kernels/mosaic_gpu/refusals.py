"""What the kernels here do not take. Apart from them, because to import Pallas takes a second."""

from pallas_kernels.attention_shape import AttentionShape

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
DTYPES = ("bfloat16", "float16")
MAX_GROUP = 16
MAX_QUERIES = 8
TILE_SIZES = (64, 128)


def refuse_decode(shape: AttentionShape) -> str | None:
    """What of `shape` decode attention does not take and what it does, or None."""
    for given, value, allowed in (
        ("the dtype", shape.dtype, DTYPES),
        ("the head size", shape.head_dim, HEAD_DIMS),
        ("the head size of values", shape.value_dim, HEAD_DIMS),
        ("the page size", shape.page_size, PAGE_SIZES),
    ):
        if value not in allowed:
            return f"{given} is {value} and mosaic_gpu's decode attention takes {', '.join(map(str, allowed))}"
    for given, value, most in (
        ("query heads for each KV head", shape.heads // shape.kv_heads, MAX_GROUP),
        ("queries a row", shape.queries, MAX_QUERIES),
    ):
        if value > most:
            return f"there are {value} {given} and mosaic_gpu's decode attention takes 1 to {most}"
    return None


def refuse_prefill(shape: AttentionShape) -> str | None:
    """What of `shape` prefill attention does not take and what it does, or None."""
    for given, value, allowed in (
        ("the dtype", shape.dtype, DTYPES),
        ("the head size", shape.head_dim, HEAD_DIMS),
        ("the head size of values", shape.value_dim, (shape.head_dim,)),
        ("the page size", shape.page_size, PAGE_SIZES),
        ("the tile size", shape.tile_size, TILE_SIZES),
    ):
        if value not in allowed:
            return f"{given} is {value} and mosaic_gpu's prefill attention takes {', '.join(map(str, allowed))}"
    return None
