"""`jaxserve env`."""

import json
from pathlib import Path

import jax
import pytest

import jaxserve
from jaxserve.cli.main import main
from jaxserve.config import EngineConfig


def test_the_table_names_versions_and_devices(capsys: pytest.CaptureFixture):
    assert main(["env"]) == 0
    rows = dict(line.rstrip().split("   ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["jaxserve"].strip() == jaxserve.__version__
    assert rows["jax"].strip() == jax.__version__
    assert "device 7" in rows  # eight are simulated


def test_json_holds_the_same(capsys: pytest.CaptureFixture):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["jax"] == jax.__version__
    assert len(facts["devices"]) == jax.device_count()
    assert facts["host"]["cores"] >= 1
    assert facts["host"]["memory_bytes"] > 2**30
    assert set(facts["compilation_cache"]) == {"directory", "files", "bytes"}


def test_compiled_programs_are_counted_in_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(EngineConfig, "compilation_cache_dir", str(tmp_path))
    for name in ("programs/a", "programs/b", "native/c.so"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["compilation_cache"]
    assert found == {"directory": str(tmp_path), "files": 3, "bytes": 15}
