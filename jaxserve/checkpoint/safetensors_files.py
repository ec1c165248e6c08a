"""The tensors of a HuggingFace directory, in one safetensors file or many, found by name and read by slice."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jaxserve.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsDirectory:
    """Memory-mapped access to every tensor of a directory. A context manager; nothing is read before it is sliced."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, safe_open] = {}
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self._directory / INDEX_FILE
        if index.exists():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index} is not a safetensors index ({error}); download it again") from error
        single = self._directory / SINGLE_FILE
        if not single.exists():
            raise InputError(
                f"{self._directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "give a HuggingFace model directory with weights in safetensors format"
            )
        return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)

    def _open(self, name: str):
        if name not in self._files:
            path = self._directory / name
            try:
                self._files[name] = safe_open(path, framework="numpy")
            except FileNotFoundError as error:
                raise InputError(
                    f"{self._directory / INDEX_FILE} names {name}, which is not there; download it"
                ) from error
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is damaged ({error}); download it again") from error
        return self._files[name]

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str):
        """A lazy tensor with `get_shape()`, read by slicing; `InputError` if there is none of that name."""
        if name not in self._file_of:
            raise InputError(f"{self._directory} has no tensor {name!r}, which this architecture needs")
        try:
            return self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise InputError(
                f"{self._directory / self._file_of[name]} has no tensor {name!r}, which its index puts there"
            ) from error

    def __enter__(self) -> "SafetensorsDirectory":
        return self

    def __exit__(self, *_) -> None:
        self._files.clear()
