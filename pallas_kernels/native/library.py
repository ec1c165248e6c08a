"""Building C++ with the machine's own compiler, once, and making the kernels of this folder known to XLA."""

import ctypes
import hashlib
import logging
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jaxlib

from pallas_kernels.devices import platform_of

CACHE = Path("~/.cache/jaxserve/native")
NEEDED_CPU_FLAGS = frozenset({"avx2", "fma"})
WIDE_CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512_bf16"})  # what `vectors.h` takes where the CPU has it
TILE_CPU_FLAGS = WIDE_CPU_FLAGS | {"amx_tile", "amx_bf16"}  # and `tiles_amx.h` beside it
TARGETS = ("matmul_nk", "matmul_nk_int4", "paged_decode_attention", "paged_prefill_attention")

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why the kernels cannot run here, in one sentence."""


def built(folder: Path) -> Path:
    """The shared library of a folder's C++, compiled unless it lies in the cache; `Unavailable` where it cannot be."""
    compiler = _compiler()
    if compiler is None:
        raise Unavailable("there is no C++ compiler (g++ or clang++) on PATH")
    sources = sorted(folder.glob("*.cc"))
    version = _run(compiler, "--version").splitlines()[0]
    parts = [version, jaxlib.__version__, *_FLAGS, *sorted(_cpu_flags())]
    parts += [path.read_text() for path in (*sources, *sorted(folder.glob("*.h")))]
    library = CACHE.expanduser() / f"{hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            _run(compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), *map(str, sources), "-o", str(made))
            made.replace(library)  # whole or not at all, whoever else is building it
    return library


def target(name: str) -> str:
    """The name by which XLA knows the kernel `name`."""
    return f"jaxserve_{name}"


@cache
def refusal() -> str | None:
    """Why the kernels cannot be called, or None. The first call builds and registers them, and logs a reason."""
    try:
        if missing := NEEDED_CPU_FLAGS - _cpu_flags():
            raise Unavailable(f"this CPU has no {', '.join(sorted(missing))}")
        library = ctypes.CDLL(str(built(Path(__file__).parent)))
    except (Unavailable, OSError) as error:
        _log.warning("plain XLA instead of the native CPU kernels: %s", error)
        return str(error)
    for name in TARGETS:
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(getattr(library, target(name))), platform="cpu")
    return None


def available() -> bool:
    """Whether the kernels can be called."""
    return refusal() is None


def instructions() -> str:
    """The CPU's instructions that the kernels are compiled for."""
    flags = _cpu_flags()
    if flags >= TILE_CPU_FLAGS:
        return "AMX-BF16"
    return "AVX512-BF16" if flags >= WIDE_CPU_FLAGS else "AVX2"


def serves(array: jax.Array) -> bool:
    """Whether the kernels run where `array` lies, or will lie when what is being traced runs."""
    return platform_of(array) == "cpu" and available()


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        raise Unavailable("/proc/cpuinfo, which names the CPU's instructions, cannot be read") from error
    return frozenset(
        next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ())
    )


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run ({error.strerror})") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise Unavailable(f"{command[0]} failed ({errors[0]})")
    return done.stdout
