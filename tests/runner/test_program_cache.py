"""Compiled programs kept on disk: found again when nothing has changed, and never otherwise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.runner import program_cache
from jaxserve.runner.compilation import compilations
from jaxserve.runner.program_cache import ProgramCache


class Compiler:
    """Compiles x + 1, and counts how often it is asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> jax.stages.Compiled:
        self.calls += 1
        return jax.jit(lambda x: {"sum": x + 1}).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()


def get(directory: Path, compiler: Compiler, *parts: object, name: str = "step") -> jax.stages.Compiled:
    return ProgramCache(str(directory), jax.devices()[:1], *parts).get(name, compiler)


def test_a_kept_program_is_loaded_and_computes_the_same(tmp_path):
    compiler = Compiler()
    get(tmp_path, compiler, "config")
    loaded, compiled = compilations.loaded, compilations.count
    again = get(tmp_path, compiler, "config")
    assert (compiler.calls, compilations.loaded - loaded, compilations.count - compiled) == (1, 1, 0)
    assert again(jnp.arange(3.0))["sum"].tolist() == [1, 2, 3]


def test_another_name_or_part_is_another_program(tmp_path):
    compiler = Compiler()
    get(tmp_path, compiler, "config")
    get(tmp_path, compiler, "config", name="other")
    get(tmp_path, compiler, "other config")
    assert compiler.calls == 3


@pytest.mark.parametrize("change", ["sources", "flags", "setting"])
def test_a_change_of_code_flags_or_settings_is_another_program(tmp_path, monkeypatch, change):
    compiler = Compiler()
    program_cache._environment.cache_clear()
    get(tmp_path, compiler)
    program_cache._environment.cache_clear()
    if change == "sources":
        monkeypatch.setattr(program_cache, "sources_digest", lambda: "edited")
    elif change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with jax.default_matmul_precision("float32" if change == "setting" else None):
        get(tmp_path, compiler)
    program_cache._environment.cache_clear()
    assert compiler.calls == 2


def test_a_damaged_file_is_compiled_again_and_mended(tmp_path, caplog):
    compiler = Compiler()
    get(tmp_path, compiler)
    (file,) = (tmp_path / "programs").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    get(tmp_path, compiler)
    assert compiler.calls == 2
    assert "compiled again" in caplog.text
    get(tmp_path, compiler)
    assert compiler.calls == 2


def test_a_directory_that_cannot_be_is_told_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = ProgramCache(str(tmp_path / "file"), jax.devices()[:1])
    compiler = Compiler()
    for name in ("prefill", "decode"):
        cache.get(name, compiler)
    assert compiler.calls == 2
    assert [record.message for record in caplog.records] == [
        f"cannot keep compiled programs in {tmp_path}/file/programs (Not a directory), so that the next start compiles "
        "them again"
    ]


def test_without_a_directory_nothing_is_kept():
    compiler = Compiler()
    ProgramCache("", jax.devices()[:1]).get("step", compiler)
    ProgramCache("", jax.devices()[:1]).get("step", compiler)
    assert compiler.calls == 2
