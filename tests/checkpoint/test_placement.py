"""Reading mapped files onto devices: the right numbers, little memory, damage told from what is whole."""

import gc
import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxserve.checkpoint import placement
from jaxserve.checkpoint.fusing import Source
from jaxserve.checkpoint.placement import Plan, place
from jaxserve.checkpoint.safetensors_files import map_file
from jaxserve.cli.bench.load import PeakMemory
from jaxserve.errors import InputError
from jaxserve.parallel.mesh import TENSOR, make_mesh

MIB = 2**20


def sharding(devices: int, *axes: str | None) -> NamedSharding:
    return NamedSharding(make_mesh(devices), PartitionSpec(*axes))


# --- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 4])
def test_loading_takes_little_memory_beyond_the_arrays(devices: int, tmp_path: Path) -> None:
    rows = 6 * MIB // 2 // 512
    path = tmp_path / "model.safetensors"
    save_file({str(i): np.full((rows, 512), i, ml_dtypes.bfloat16) for i in range(16)}, path)
    plans = [
        Plan((rows, 512), np.dtype(jnp.bfloat16), sharding(devices, TENSOR, None), [Source(name, tensor, rows)])
        for name, tensor in map_file(path).items()
    ]
    place(plans[:1])  # threads and imports
    gc.collect()
    with PeakMemory() as memory:
        arrays = place(plans)
    assert sorted(float(array[-1, -1]) for array in arrays) == list(range(16))
    assert sum(array.nbytes for array in arrays) == 96 * MIB
    assert memory.peak_bytes < (96 + 6 / devices + 8) * MIB


def test_parts_that_leave_the_host_make_the_arrays_that_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [np.random.default_rng(seed).normal(size=(8 * rows, 24)) for seed, rows in enumerate((1, 3, 700, 2, 90))]
    plans = [
        Plan(rows.shape, np.dtype(np.float32), sharding(4, *axes), [Source("rows", rows.astype(np.float32), len(rows))])
        for rows in tables
        for axes in ((TENSOR, None), (None, TENSOR), (None, None))
    ]
    kept = place(plans)
    monkeypatch.setattr(placement, "_on_host", lambda plans: False)
    for plan, stayed, left in zip(plans, kept, place(plans), strict=True):
        assert stayed.sharding == left.sharding == plan.sharding
        np.testing.assert_array_equal(stayed, plan.sources[0].rows)
        np.testing.assert_array_equal(left, plan.sources[0].rows)


def test_what_is_placed_on_a_cpu_is_not_copied_again() -> None:
    rows = np.arange(4 * MIB, dtype=np.float32).reshape(-1, 1024)
    plan = Plan(rows.shape, rows.dtype, sharding(2, None, None), [Source("both", rows, len(rows))])
    (array,) = place([plan])
    first, second = (shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards)
    assert first == second  # both devices use the one buffer that was filled


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_tensor_with_a_nan_is_warned_of_by_name(kind: Any, sign: int, caplog: pytest.LogCaptureFixture) -> None:
    clean = np.full((300, 64), sign * np.inf, kind)
    broken = clean.copy()
    broken[299, 63] = np.copysign(np.nan, sign)
    plans = [
        Plan(rows.shape, rows.dtype, sharding(1, None, None), [Source(name, rows, 300)])
        for name, rows in (("clean", clean), ("broken", broken))
    ]
    with caplog.at_level(logging.WARNING):
        place(plans)
    assert ["broken" in record.getMessage() for record in caplog.records] == [True]


# --- safetensors files -----------------------------------------------------------------------------------------------


def write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int = 0, end: int = 24, shape: Any = (2, 3), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint8, np.int64, np.bool_)
    tensors = {np.dtype(kind).name: np.arange(12).reshape(3, 4).astype(kind) for kind in kinds}
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["scalar"] = np.array(7, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = map_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "none of safetensors"),
        ([], "none of safetensors"),
        (b"[" * 100_000, "none of safetensors"),
        ({"a": 7}, "none of safetensors"),
        ({"a": {"dtype": "F32"}}, "'shape'"),
        ({"a": entry(dtype="F7")}, "'F7'"),
        ({"a": entry(shape=[-2, -3])}, "not made of sizes"),
        ({"a": entry(shape=["x"])}, "not made of sizes"),
        ({"a": entry(shape=3)}, "none of safetensors"),
        ({"a": entry(end=20)}, "'a' the wrong bytes"),
        ({"a": entry(shape=[2, 4])}, "'a' the wrong bytes"),
        ({"a": entry(shape=[2**40, 2**40], end=24)}, "'a' the wrong bytes"),
        ({"a": entry(begin=-8, end=16)}, "not made of sizes"),
        ({"a": entry(end=48, shape=[4, 3])}, "tensors end at byte"),
        ({"a": entry(), "b": entry()}, "the wrong bytes"),  # both in one place
        ({"a": entry(end=8, shape=[2]), "b": entry(begin=12, end=24, shape=[3])}, "'b' the wrong bytes"),  # a hole
        ({"a": entry(end=8, shape=[2])}, "tensors end at byte"),  # bytes that belong to none
    ],
)
def test_a_header_that_lies_is_refused_by_the_file(header: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", header)
    with pytest.raises(InputError) as refused:
        map_file(path)
    assert f"{path} is damaged" in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="its header ends at byte"):
        map_file(path)
