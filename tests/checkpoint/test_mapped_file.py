"""Files mapped into memory, found again behind the views of them."""

import os

import numpy as np
import pytest

from jaxserve.checkpoint.mapped_file import MappedFile, file_of


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(50_021))
    return path


def test_views_of_a_mapped_file_are_known_as_such_and_others_not(path):
    mapped = MappedFile(path)
    numbers = np.frombuffer(mapped, np.uint16, 300, 8)
    assert file_of(numbers.reshape(3, 100)[1:].view(np.int16)) is mapped
    assert file_of(numbers.copy()) is None


def test_the_file_is_closed_with_its_last_view(path):
    before = len(os.listdir("/proc/self/fd"))
    view = np.frombuffer(MappedFile(path), np.uint8)
    assert len(os.listdir("/proc/self/fd")) > before
    del view
    assert len(os.listdir("/proc/self/fd")) == before
