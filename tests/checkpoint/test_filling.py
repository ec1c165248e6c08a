"""Memory filled with tensors: the right numbers from wherever they lie, and every NaN seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.checkpoint import filling
from jaxserve.checkpoint.filling import Copy, Fill, by_numpy, fastest_fill
from jaxserve.checkpoint.mapped_file import MappedFile
from jaxserve.errors import InputError
from pallas_kernels.native import library

KIB = 2**10
START = 13  # where the numbers begin in their file: safetensors aligns them to nothing
NUMBERS = [jnp.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn, np.int8]


@pytest.fixture(scope="module", params=["native", "numpy"])
def fill(request: pytest.FixtureRequest) -> Fill:
    if request.param == "numpy":
        return by_numpy
    if fastest_fill() is by_numpy:
        pytest.skip("there is no C++ compiler to build the native code with")
    return fastest_fill()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filling") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(START + 5 * 2**20))
    return path


def stored(path: Path, shape: tuple[int, ...], kind: Any, numbers: np.ndarray | None = None) -> np.ndarray:
    """A view of the mapped file, which holds `numbers` or noise of no NaN."""
    if numbers is None:
        numbers = np.random.default_rng(1).integers(-40, 40, shape).astype(kind)
    with path.open("r+b") as file:
        file.seek(START)
        file.write(numbers.tobytes())
    return np.frombuffer(MappedFile(path), kind, numbers.size, START).reshape(shape)


@st.composite
def slices(draw: st.DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, int, int], tuple[slice, ...]]:
    """A shape `[blocks, rows, columns]` and a part of it: rows shorter and longer than what is read at once."""
    shape = draw(
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 3, 64, 9 * KIB, 20 * KIB]))
        | st.sampled_from([(1, 1, 700 * KIB), (2, 1, 300 * KIB)])
    )
    return shape, tuple(draw(slices(size)) for size in shape)


@given(
    tensor=tensors(), kind=st.sampled_from(NUMBERS), apart=st.tuples(*[st.integers(0, 2)] * 3), swapped=st.booleans()
)
def test_any_part_of_a_tensor_gets_to_any_place(
    fill: Fill, path: Path, tensor: Any, kind: Any, apart: tuple[int, ...], swapped: bool
) -> None:
    shape, part = tensor
    source = stored(path, shape, kind)[part]
    source = source.swapaxes(0, 2) if swapped else source
    around = np.full([size + more for size, more in zip(source.shape, apart, strict=True)], 99, kind)
    inner = tuple(slice(size) for size in source.shape)
    assert fill([Copy("it", around[inner], source)]) == []
    np.testing.assert_array_equal(around[inner], source)
    around[inner] = 99
    assert (around == np.full((), 99, kind)).all()  # nothing beside it was touched


@pytest.mark.parametrize("kind", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("place", [(0, 0), (2, 8 * KIB), (299, 10_239)])
@pytest.mark.parametrize("width", [KIB, 10_240])  # columns copied, which are short, and read
def test_one_nan_is_seen_in_its_tensor_alone_and_infinity_is_none(
    fill: Fill, path: Path, kind: Any, sign: int, place: tuple[int, int], width: int
) -> None:
    shape = (300 if kind is not np.float32 else 150, 10_240 // 2)
    numbers = np.full(shape, sign * np.inf, kind)
    row, column = place[0] * shape[0] // 300, place[1] // 2
    numbers[row, column] = np.copysign(np.nan, sign)
    source = stored(path, shape, kind, numbers)
    first = min(column, shape[1] - width // 2)
    with_nan = source[:, first : first + width // 2]
    clean = np.delete(source, row, axis=0)
    copies = [Copy(name, np.empty_like(rows), rows) for name, rows in (("clean", clean), ("broken", with_nan))]
    assert fill(copies) == ["broken"]


def test_other_dtypes_are_converted(fill: Fill, path: Path) -> None:
    source = stored(path, (7, 30), np.float16)
    target = np.empty((7, 30), jnp.bfloat16)
    assert fill([Copy("it", target, source)]) == []
    np.testing.assert_array_equal(target, source.astype(jnp.bfloat16))


def test_a_file_that_is_cut_off_meanwhile_is_named(tmp_path: Path) -> None:
    if fastest_fill() is by_numpy:
        pytest.skip("without native code a mapping is copied, and the system ends a program that misses a part of one")
    path = tmp_path / "file"
    path.write_bytes(bytes(50_021))
    whole = np.frombuffer(MappedFile(path), np.uint8)
    with path.open("r+b") as file:
        file.truncate(30_000)
    with pytest.raises(InputError, match=r"file was cut off at byte 30000 .*download it again"):
        fastest_fill()(
            [Copy("head", np.empty(21, np.uint8), whole[:21]), Copy("it", np.empty(50_000, np.uint8), whole[21:])]
        )


def test_a_file_that_cannot_be_read_is_named_with_the_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fastest_fill() is by_numpy:
        pytest.skip("without native code nothing is read")
    source = stored(path, (40_000,), np.uint8)
    monkeypatch.setattr(filling.file_of(source), "descriptor", -1)
    with pytest.raises(
        InputError, match=rf"cannot read .*file at byte {START} \(Bad file descriptor\); check the disk"
    ):
        fastest_fill()([Copy("it", np.empty(40_000, np.uint8), source)])


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "_compiler", lambda: None)
    fastest_fill.cache_clear()
    yield
    fastest_fill.cache_clear()


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_numpy_fills() -> None:
    assert fastest_fill() is by_numpy
