"""Hopper's decode attention in the interpreter, against the float64 reference. A case takes seconds: they are few."""

from functools import partial

import pytest

from pallas_kernels.mosaic_gpu.decode import paged_decode_attention
from tests.pallas_kernels.mosaic_gpu.interpreter import interpreted
from tests.pallas_kernels.reference import check_decode

PLAIN = {"queries": 1, "window": None, "soft_cap": None, "with_sinks": False, "seed": 0}


@pytest.mark.parametrize(
    ("blocks", "case"),
    [
        pytest.param(
            3,
            # 1 + 2 + 4 tiles under each of two heads: blocks begin and end within rows, with more tiles than they hold.
            {"lengths": [1, 0, 65, 256], "kv_heads": 2, "group": 2, "head_dim": 128, "page_size": 16},
            id="rows-of-several-blocks-and-blocks-of-several-rows",
        ),
        pytest.param(
            2,
            {"lengths": [129, 64, 70], "kv_heads": 1, "group": 3, "head_dim": 80, "page_size": 128}
            | {"queries": 3, "window": 20, "soft_cap": 2.0, "with_sinks": True},
            id="everything-at-once-with-a-head-size-that-is-padded",
        ),
        pytest.param(
            9,  # more than there is work for
            {"lengths": [63, 200], "kv_heads": 1, "group": 1, "head_dim": 256, "page_size": 64, "dtype": "float16"},
            id="one-head-in-float16-over-more-blocks-than-tiles",
        ),
        pytest.param(
            2,
            # The window begins in the middle of a page, and pages before it are gone; three queries see nothing at all.
            {"lengths": [300, 5], "kv_heads": 1, "group": 8, "head_dim": 96, "page_size": 32}
            | {"queries": 8, "window": 100, "with_sinks": True},
            id="more-columns-than-one-pass-takes",
        ),
    ],
)
def test_interpreted_decode_equals_float64_attention_without_races(blocks, case, capsys):
    with interpreted(capsys):
        check_decode(partial(paged_decode_attention, blocks=blocks), **({"dtype": "bfloat16"} | PLAIN | case))
