"""The C++ kernels against float64, and what happens where they cannot be built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul import matmul_nk as dispatched_matmul_nk
from pallas_kernels.native import library
from pallas_kernels.native.matmul import WEIGHTS, matmul_nk, matmul_nk_int4
from pallas_kernels.native.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.matmul import matmul_nk as xla_matmul_nk
from pallas_kernels.xla.matmul import unpacked
from tests.pallas_kernels.reference import check_decode, check_prefill

built = pytest.mark.skipif(
    not library.available(), reason=f"the native kernels cannot be built here: {library.refusal()}"
)


def weights_of(kind, rng, shape):
    """Of eight bits, any that are numbers."""
    if jnp.dtype(kind).itemsize > 1:
        return jnp.asarray(rng.normal(size=shape), kind)
    bits = rng.integers(0, 256, shape, np.uint8)
    return jnp.asarray((bits if kind == jnp.int8 else np.where(bits & 0x7F == 0x7F, 0, bits)).view(jnp.dtype(kind)))


@built
@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 65),
    inner=st.sampled_from([1, 2, 31, 32, 33, 63, 100, 257, 1024]),
    outer=st.sampled_from([1, 7, 15, 16, 17, 24, 40, 129, 2050]),
    padding=st.sampled_from([0, 0, 1, 16, 40]),
    kind=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 1000),
)
def test_matmul_equals_float64_for_any_sizes_and_padding(rows, inner, outer, padding, kind, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.bfloat16)
    x = x.at[max(0, rows - padding) :].set(0)
    weight = weights_of(kind, rng, (outer, inner))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # Float32 sums of exact products: each addition errs by 2^-24 of what was summed up so far.
    bound = 2.0**-24 * inner * (np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T)
    assert np.all(np.abs(np.asarray(jax.jit(matmul_nk)(x, weight)) - expected) <= bound + 1e-30)


@built
@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 65),
    groups=st.integers(1, 5),
    size=st.sampled_from([2, 3, 8, 30, 32, 64, 96, 128, 256]),
    outer=st.sampled_from([1, 7, 15, 16, 17, 24, 40, 129, 2050]),
    padding=st.sampled_from([0, 0, 1, 16, 40]),
    seed=st.integers(0, 1000),
)
def test_a_product_with_four_bits_equals_float64_for_any_groups(rows, groups, size, outer, padding, seed):
    groups += groups * size % 2  # a row is whole bytes
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, groups * size)), jnp.bfloat16)
    x = x.at[max(0, rows - padding) :].set(0)
    weight = jnp.asarray(rng.integers(0, 256, (outer, groups * size // 2), np.uint8))
    scale = jnp.asarray(rng.uniform(0.01, 1, (outer, groups)), jnp.float32)
    zero = jnp.asarray(rng.integers(-8, 9, (outer, groups)), jnp.int8)
    found = np.asarray(jax.jit(matmul_nk_int4)(x, weight, scale, zero))

    def off(dtype):
        """How much more than float32 sums may err, if a weight is rounded to `dtype` first."""
        meant = np.asarray(unpacked(weight, scale, zero, dtype), np.float64)
        bound = 2.0**-22 * groups * size * (np.abs(np.asarray(x, np.float64)) @ np.abs(meant).T)
        return np.abs(found - np.asarray(x, np.float64) @ meant.T) - bound

    assert min(off(dtype).max() for dtype in (jnp.float32, jnp.bfloat16)) <= 1e-30


shapes = {
    "kv_heads": st.sampled_from([1, 2, 5]),
    "group": st.sampled_from([1, 2, 3, 4, 7]),
    "head_dim": st.sampled_from([32, 64, 96, 128, 192]),
    "page_size": st.sampled_from([1, 8, 32, 40, 64]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "window": st.sampled_from([None, None, 1, 7, 16, 50]),
    "soft_cap": st.sampled_from([None, None, 2.0]),
    "with_sinks": st.booleans(),
    "seed": st.integers(0, 1000),
}


@built
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 8, 16, 17, 63, 64, 65, 130, 333]), min_size=1, max_size=5),
    queries=st.sampled_from([1, 1, 2, 5, 8]),
    **shapes,
)
def test_decode_equals_float64_attention_and_reads_no_unused_position(**case):
    check_decode(paged_decode_attention, **case)


@built
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 40, 64, 65, 100, 130, 200]), min_size=16, max_size=40),
    shared=st.integers(1, 6),
    queries=st.sampled_from([1, 1, 2, 3]),
    **shapes | {"kv_heads": st.sampled_from([1, 2]), "page_size": st.sampled_from([8, 32, 32, 64])},
)
def test_sequences_that_share_pages_attend_as_each_would_alone(**case):
    check_decode(paged_decode_attention, **case)


@built
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 9, 64]), st.sampled_from([1, 5, 16, 17, 40])), min_size=1, max_size=3
    ),
    tile_size=st.sampled_from([8, 16, 32]),
    **shapes,
)
def test_prefill_equals_causal_float64_attention_for_ragged_chunks(**case):
    check_prefill(paged_prefill_attention, **case)


@built
def test_gradients_are_those_of_xla():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(size, 64)), jnp.bfloat16) for size in (3, 40))

    def total(product):
        return jax.grad(lambda x, weight: jnp.sum(product(x, weight) ** 2), argnums=(0, 1))(x, weight)

    for found, expected in zip(total(matmul_nk), total(xla_matmul_nk), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@built
def test_programs_of_several_devices_run_at_the_same_time():
    """Each call waits for its own pieces only, whatever else holds the threads."""
    devices = jax.devices()[:4]
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(4, 256)), rng.normal(size=(1024, 256))
    expected = (
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
        @ np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float64).T
    )
    mesh = jax.sharding.Mesh(np.asarray(devices), ("tensor",))
    split = jax.sharding.PartitionSpec("tensor", None)
    run = jax.jit(
        jax.shard_map(
            lambda x, weight: jax.lax.fori_loop(
                0, 50, lambda _, y: matmul_nk(x, weight), jnp.zeros((4, weight.shape[0]), jnp.float32)
            ),
            mesh=mesh,
            in_specs=(jax.sharding.PartitionSpec(), split),
            out_specs=jax.sharding.PartitionSpec(None, "tensor"),
            check_vma=False,
        )
    )
    found = run(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3)


def test_only_bf16_on_one_cpu_device_takes_the_native_product(monkeypatch):
    monkeypatch.setattr(library, "available", lambda: True)

    def calls(devices: int, dtype: str) -> bool:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("tensor",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arrays = (jax.device_put(jnp.ones(shape, dtype), where) for shape in ((2, 32), (8, 32)))
        return "jaxserve_matmul_nk" in jax.jit(dispatched_matmul_nk).lower(*arrays).as_text()

    assert calls(1, "bfloat16")
    assert not calls(1, "float32")
    assert not calls(2, "bfloat16")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setattr(library, "CACHE", tmp_path)
    return tmp_path


@built
def test_the_library_is_built_once_and_anew_when_a_source_changes(elsewhere, monkeypatch, tmp_path_factory):
    commands = []
    run = library._run
    monkeypatch.setattr(library, "_run", lambda *command: commands.append(command) or run(*command))
    monkeypatch.setattr(library, "_FLAGS", ("-O0", *library._FLAGS[1:]))  # quicker
    sources = tmp_path_factory.mktemp("sources")
    (sources / "one.cc").write_text('extern "C" int one() { return 1; }\n')
    first = library.built(sources)
    assert library.built(sources) == first
    (sources / "one.cc").write_text('extern "C" int one() { return 2; }\n')
    second = library.built(sources)
    assert {path.name for path in elsewhere.iterdir()} == {first.name, second.name}
    assert sum("-o" in command for command in commands) == 2


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_cpu_flags", lambda: frozenset({"avx"}), "this CPU has no avx2, fma"),
        ("_compiler", lambda: None, "there is no C++ compiler"),
        ("_compiler", lambda: "/nowhere/g++", "/nowhere/g++ does not run"),
        ("_compiler", lambda: "false", "false failed"),
    ],
)
def test_where_it_cannot_be_built_the_reason_is_logged_once(elsewhere, monkeypatch, caplog, name, value, reason):
    monkeypatch.setattr(library, "_cpu_flags", lambda: library.NEEDED_CPU_FLAGS)
    monkeypatch.setattr(library, name, value)
    library.refusal.cache_clear()
    try:
        assert not library.available()
        assert not library.available()
    finally:
        library.refusal.cache_clear()
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert not list(elsewhere.iterdir())
