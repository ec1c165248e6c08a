"""Which implementation attention gets, and what is refused before anything runs."""

import logging
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import ATTENTION_BACKENDS
from pallas_kernels import paged_attention
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.grouped_matmul import choose_grouped_matmul
from pallas_kernels.implementations import IMPLEMENTATIONS, log_once
from pallas_kernels.native import library
from pallas_kernels.paged_attention import choose_decode, choose_prefill, paged_decode_attention

SERVED = AttentionShape(32, 8, 128, 128, 64, "bfloat16")
HOPPER: Any = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
AMPERE: Any = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
CPU: Any = SimpleNamespace(platform="cpu", device_kind="cpu")


def arrays(head_dim: int = 64, page_size: int = 16, dtype: str = "bfloat16") -> tuple[jax.Array, ...]:
    """Queries of one row, pages, page table and length."""
    pages = jnp.ones((2, 2, page_size, head_dim), dtype)
    return jnp.ones((1, 1, 4, head_dim), dtype), pages, pages, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)


def test_the_engine_offers_every_implementation():
    assert ATTENTION_BACKENDS == IMPLEMENTATIONS


@pytest.mark.parametrize(
    ("device", "implementation"),
    [(HOPPER, "mosaic_gpu"), (AMPERE, "xla")],
    ids=["hopper", "ampere"],
)
def test_auto_takes_the_kernel_on_hopper_only_and_says_why(device, implementation):
    choice = choose_decode("auto", SERVED, device)
    assert choice.implementation == implementation
    assert device.device_kind in choice.reason
    assert choose_decode("xla", SERVED, device).implementation == "xla"


@pytest.mark.parametrize("choose", [choose_decode, choose_prefill])
def test_a_cpu_gets_the_native_kernels_if_they_can_be_built_and_take_the_shape(monkeypatch, choose):
    monkeypatch.setattr(library, "refusal", lambda: None)
    assert choose("auto", SERVED, CPU).implementation == "native"
    choice = choose("auto", SERVED._replace(head_dim=80, value_dim=80), CPU)
    assert (choice.implementation, choice.refused) == ("xla", True)
    assert choice.reason == "the head size is 80 and native attention takes multiples of 32"
    monkeypatch.setattr(library, "refusal", lambda: "there is no C++ compiler")
    assert choose("auto", SERVED, CPU) == ("xla", "there is no C++ compiler", False)
    with pytest.raises(ValueError, match="there is no C"):
        choose("native", SERVED, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "the dtype is float32 and mosaic_gpu's decode attention takes bfloat16, float16"),
        ({"head_dim": 72}, "the head size is 72 and mosaic_gpu's decode attention takes 64, 80, 96, 128, 256"),
        ({"value_dim": 512}, "the head size of values is 512"),
        ({"page_size": 8}, "the page size is 8 and mosaic_gpu's decode attention takes 16, 32, 64, 128"),
        ({"heads": 160}, "there are 20 query heads for each KV head and mosaic_gpu's decode attention takes 1 to 16"),
        ({"queries": 9}, "there are 9 queries a row and mosaic_gpu's decode attention takes 1 to 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_kernel_does_not_take_is_an_error_by_name_and_xla_by_auto(change, message):
    shape = SERVED._replace(**change)
    with pytest.raises(ValueError, match=message):
        choose_decode("mosaic_gpu", shape, HOPPER)
    choice = choose_decode("auto", shape, HOPPER)
    assert choice.implementation == "xla"
    assert choice.reason.startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_dim": 64}, "the head size of values is 64 and mosaic_gpu's prefill attention takes 128"),
        ({"tile_size": 32}, "the tile size is 32 and mosaic_gpu's prefill attention takes 64, 128"),
    ],
)
def test_prefill_has_a_kernel_of_its_own_and_refuses_what_is_its_own(change, message):
    shape = SERVED._replace(tile_size=64)
    assert choose_prefill("auto", shape, HOPPER).implementation == "mosaic_gpu"
    with pytest.raises(ValueError, match=message):
        choose_prefill("mosaic_gpu", shape._replace(**change), HOPPER)


def test_falling_back_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    log_once.cache_clear()
    for _ in range(2):
        paged_decode_attention(*arrays(page_size=8), scale=1.0)
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (
            logging.WARNING,
            "decode attention runs in XLA: the page size is 8 and mosaic_gpu's decode attention takes 16, 32, 64, 128",
        )
    ]


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, jnp.ones((1, 1, 3, 64), jnp.bfloat16), "3 query heads over 2 KV heads"),
        (1, jnp.ones((2, 2, 16, 32), jnp.bfloat16), r"the shape of k_pages is \(2, 2, 16, 32\)"),
        (2, jnp.ones((2, 2, 16, 64), jnp.float16), "k_pages are bfloat16 and v_pages float16"),
        (3, jnp.zeros((2, 1), jnp.int32), r"the shape of the page table is \(2, 1\)"),
        (4, jnp.ones(2, jnp.int32), r"the shape of lengths is \(2,\)"),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(place, wrong, message):
    arguments = list(arrays())
    arguments[place] = wrong
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(*arguments, scale=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "the window is 0"),
        ({"sinks": jnp.zeros(3)}, r"the shape of sinks is \(3,\)"),
        ({"implementation": "triton"}, "the implementation is 'triton'; give one of auto, mosaic_gpu, native, xla"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(*arrays(), scale=1.0, **settings)


def test_queries_of_another_dtype_than_the_pages_go_to_xla():
    q, *rest = arrays()
    shape = paged_attention._shape(q.astype(jnp.float32), *rest[:2], None, None)
    assert choose_decode("auto", shape, HOPPER).reason.startswith(
        "the dtype is float32 for queries and bfloat16 for pages"
    )


def test_grouped_products_take_the_kernel_on_hopper_if_it_takes_the_operands(monkeypatch):
    def choose(dtype: str, features: int = 64, implementation: str = "auto") -> str:
        x, weights = jnp.zeros((4, 32), dtype), jnp.zeros((3, features, 32), dtype)
        return choose_grouped_matmul(implementation, x, weights).implementation

    assert choose("bfloat16") == "xla"  # on a CPU
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    assert choose("bfloat16") == "mosaic_gpu"
    assert choose("float32") == "xla"
    assert choose("bfloat16", features=24) == "mosaic_gpu"
    assert choose("bfloat16", features=60) == choose("bfloat16", features=72) == "xla"
    with pytest.raises(ValueError, match="multiples of 64 features, and below that of 8"):
        choose("bfloat16", features=60, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="has no grouped products"):
        choose("bfloat16", implementation="native")


@pytest.mark.parametrize("choose", [choose_decode, choose_prefill])
def test_values_that_are_a_part_of_their_keys_are_read_in_xla_only(choose):
    latents = SERVED._replace(kv_heads=1, value_dim=0)
    choice = choose("auto", latents, HOPPER)
    assert (choice.implementation, choice.refused) == ("xla", True)
    with pytest.raises(ValueError, match="only XLA's attention reads"):
        choose("mosaic_gpu", latents, HOPPER)
