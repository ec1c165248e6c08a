"""`jaxserve env`."""

import json

import jax
import pytest

import jaxserve
from jaxserve.cli.main import main


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
