"""Compiled programs on disk, so that the next start neither traces nor compiles them.

JAX's own cache spares a start the compilation only, and tracing and lowering cost a large model as much again.
"""

import hashlib
import logging
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

import pallas_kernels
from jaxserve.runner.compilation import compilations
from pallas_kernels.native import library

_log = logging.getLogger(__name__)
# Of this package: what programs are traced from.
_PARTS = ("layers", "models", "parallel", "runner", "sampling_params.py")
_SOURCES = ("*.py", "*.cc", "*.h")
_PLACES = {"jax_compilation_cache_dir"}  # settings of JAX that say where things are, and not what is computed


class ProgramCache:
    """Programs by name, run on `devices` and made from `parts`: all that matters besides this code and JAX.

    Every file is found by a hash of all of that, the sources that it is traced from included: none can be stale.
    Without a `directory` nothing is kept.
    """

    def __init__(self, directory: str, devices: Sequence[jax.Device], *parts: Any):
        self._directory = Path(directory).expanduser() / "programs" if directory else None
        self._devices = list(devices)
        self._parts = repr(([device.id for device in devices], jax.process_index(), parts))
        self._given_up = threading.Lock()  # held for good by the first thread that cannot write

    def get(self, name: str, compile_: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        """The program `name`, from the disk or from `compile_`."""
        if self._directory is None:
            return compile_()
        path = self._directory / _digest(_environment(), self._parts, name)
        found = _read(path, self._devices)
        if found is None:
            cached = compilations.cached_here()
            found = compile_()
            if compilations.cached_here() == cached:  # what XLA's CPU compiler has read from a cache cannot be written
                self._keep(path, found)
        return found

    def _keep(self, path: Path, program: jax.stages.Compiled) -> None:
        if self._given_up.locked():
            return
        try:
            _write(path, program)
        except OSError as error:
            if self._given_up.acquire(blocking=False):
                _log.warning(
                    "cannot keep compiled programs in %s (%s), so that the next start compiles them again",
                    path.parent,
                    error.strerror,
                )


def _read(path: Path, devices: list[jax.Device]) -> jax.stages.Compiled | None:
    # A program is code, and pickled: only what this user has written is loaded.
    try:
        if path.stat().st_uid != os.getuid():
            return None
        program, takes, gives = pickle.loads(path.read_bytes())
        loaded = serialize_executable.deserialize_and_load(program, takes, gives, execution_devices=devices)
    except OSError:  # mostly, that it is not there; writing tells what else is wrong with the directory
        return None
    except Exception as error:  # whatever damage does to it, compiling again mends it
        _log.warning("cannot use the compiled program %s (%s); it is compiled again", path, error)
        return None
    compilations.note_loaded()
    return loaded


def _write(path: Path, program: jax.stages.Compiled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(pickle.dumps(serialize_executable.serialize(program)))
    os.replace(file.name, path)


@cache
def _environment() -> str:
    """What a program depends on besides its own definition: sources, versions, devices and their features, settings."""
    settings = {name: value for name, value in jax.config.values.items() if name not in _PLACES}
    devices = [(device.platform, device.device_kind, device.id) for device in jax.devices()]
    backend = jax.devices()[0].client.platform_version
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return _digest(
        jax.__version__,
        flax.__version__,
        jaxlib.__version__,
        backend,
        devices,
        _cpu_features(),
        devices[0][0] == "cpu" and library.available(),  # makes the kernels known, too, that a program may call
        flags,
        sorted(settings.items()),
        sources_digest(),
    )


@cache
def sources_digest() -> str:
    """A hash of the code that programs are traced from."""
    found = hashlib.sha256()
    package = Path(__file__).parent.parent
    for root in (*(package / part for part in _PARTS), Path(pallas_kernels.__file__).parent):
        paths = [root] if root.is_file() else [path for pattern in _SOURCES for path in root.rglob(pattern)]
        for path in sorted(paths):
            found.update(f"{path.relative_to(root.parent)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
