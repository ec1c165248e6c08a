"""Parts of a mapped file, read to where they belong."""

import os

import numpy as np
import pytest

from jaxserve.checkpoint.mapped_file import MappedFile, file_of
from jaxserve.checkpoint.placement import copy
from jaxserve.errors import InputError


@pytest.fixture
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 50_021, dtype=np.uint8)


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    return path


@pytest.mark.parametrize("rows", [1, 7, 2500])  # more than are read in one call
@pytest.mark.parametrize("apart", [False, True])
def test_rows_are_read_from_any_place_to_rows_together_or_apart(path, content, rows, apart):
    start, width = 13, 19
    expected = content[start : start + rows * width].reshape(rows, width)
    source = np.frombuffer(MappedFile(path), np.uint8)[start : start + rows * width].reshape(rows, width)
    around = np.full((rows, 2 * width if apart else width), 255, np.uint8)
    target = around[:, :width]
    file_of(source).read_into(target, source)
    np.testing.assert_array_equal(target, expected)
    assert (around[:, width:] == 255).all()


def test_views_of_a_mapped_file_are_known_as_such_and_others_not(path):
    mapped = MappedFile(path)
    numbers = np.frombuffer(mapped, np.uint16, 300, 8)
    assert file_of(numbers.reshape(3, 100)[1:].view(np.int16)) is mapped
    assert file_of(numbers.copy()) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_is_right_whether_it_is_read_or_not(path, content, transposed):
    source = np.frombuffer(MappedFile(path), np.uint16, 600, 3).reshape(20, 30)
    source = source.T if transposed else source
    target = np.zeros(source.shape, np.uint16)
    copy(target, source)
    expected = np.frombuffer(content[3:1203].tobytes(), np.uint16).reshape(20, 30)
    np.testing.assert_array_equal(target, expected.T if transposed else expected)


def test_a_file_that_is_cut_off_meanwhile_is_named(path):
    source = np.frombuffer(MappedFile(path), np.uint8)
    with path.open("r+b") as file:
        file.truncate(30_000)
    with pytest.raises(InputError, match="file was cut off at byte 30000"):
        file_of(source).read_into(np.empty(50_021, np.uint8), source)


def test_the_file_is_closed_with_its_last_view(path):
    before = len(os.listdir("/proc/self/fd"))
    view = np.frombuffer(MappedFile(path), np.uint8)
    assert len(os.listdir("/proc/self/fd")) > before
    del view
    assert len(os.listdir("/proc/self/fd")) == before
