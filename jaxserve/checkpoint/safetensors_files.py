"""The tensors of a HuggingFace directory, in one safetensors file or many, mapped into memory and found by name."""

import itertools
import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.checkpoint.mapped_file import MappedFile
from jaxserve.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
    }.items()
}


class SafetensorsDirectory:
    """Every tensor of a directory as a view of its mapped file: nothing is read before it is used."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, dict[str, np.ndarray]] = {}
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self._directory / INDEX_FILE
        if index.exists():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index} is not a safetensors index ({error}); download it again") from error
        if (self._directory / SINGLE_FILE).exists():
            return dict.fromkeys(self._file(SINGLE_FILE), SINGLE_FILE)
        pickled = sorted(path.name for pattern in _PICKLED for path in self._directory.glob(pattern))
        if pickled:
            raise InputError(
                f"{self._directory} holds {pickled[0]} and no safetensors, and pickled weights are never opened, since "
                "they can run any program; where PyTorch is, convert them with transformers' "
                f"AutoModelForCausalLM.from_pretrained({str(self._directory)!r}).save_pretrained(...)"
            )
        raise InputError(
            f"{self._directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "give a HuggingFace model directory with weights in safetensors format"
        )

    def _file(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._files:
            try:
                self._files[name] = map_file(self._directory / name)
            except FileNotFoundError as error:
                raise InputError(
                    f"{self._directory / INDEX_FILE} names {name}, which is not there; download it"
                ) from error
        return self._files[name]

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor's bytes where the file is mapped, read-only; `InputError` if there is none of that name."""
        if name not in self._file_of:
            raise InputError(f"{self._directory} has no tensor {name!r}, which this architecture needs")
        try:
            return self._file(self._file_of[name])[name]
        except KeyError as error:
            raise InputError(
                f"{self._directory / self._file_of[name]} has no tensor {name!r}, which its index puts there"
            ) from error


def map_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, as read-only views of the mapped file.

    `InputError` for a file that is cut off or whose header contradicts itself; `FileNotFoundError` if there is none.
    """
    try:
        return _tensors(MappedFile(path))
    except FileNotFoundError:
        raise
    except (_Damaged, ValueError, OSError) as error:  # an empty file cannot be mapped
        raise InputError(f"{path} is damaged ({error}); download it again") from error


def write_file(path: Path, shapes: dict[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[np.ndarray]) -> None:
    """Write tensors of these dtypes and shapes, which come in this order, one after the other.

    `InputError` if that fails, and then `path` is as it was.
    """
    names = {kind: name for name, kind in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know that it may read them
    end = 0
    for name, (kind, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": names[kind], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                file.write(np.ascontiguousarray(tensor).view(np.uint8).data)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); make room or give another place") from error
    finally:
        unfinished.unlink(missing_ok=True)


class _Damaged(Exception):
    pass


def _tensors(mapped: mmap.mmap) -> dict[str, np.ndarray]:
    start = 8 + int.from_bytes(mapped[:8], "little")
    if not 8 < start <= len(mapped):
        raise _Damaged(f"its header ends at byte {start} and the file at {len(mapped)}")
    try:
        header = json.loads(mapped[8:start])
        entries = {name: _Entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Damaged(f"its header is none of safetensors: {error}") from error
    ends = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != ends or entry.end - entry.begin != math.prod(entry.shape) * entry.dtype.itemsize:
            raise _Damaged(f"its header gives {name!r} the wrong bytes, {entry.begin} to {entry.end}")
        ends = entry.end
    if start + ends != len(mapped):
        raise _Damaged(f"its tensors end at byte {start + ends} and the file at {len(mapped)}")
    return {
        name: np.frombuffer(mapped, entry.dtype, math.prod(entry.shape), start + entry.begin).reshape(entry.shape)
        for name, entry in entries.items()
    }


class _Entry:
    """What a header says of one tensor."""

    def __init__(self, entry: dict[str, Any]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[entry["dtype"]]
        self.shape = tuple(entry["shape"])
        self.begin, self.end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in itertools.chain(self.shape, (self.begin, self.end))):
            raise ValueError(f"{entry} is not made of sizes")
