"""The check of real clients: its programs, what it tells of them, and the environments that it makes."""

import contextlib
import importlib.metadata
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import check_clients
from scripts.check_clients import CLIENTS, Client, Outcome, environment, outcomes
from tests.server.processes import Served, served

PROGRAM = """\
import os, sys
import checks

def what_holds(server): print("not for the one who reads the outcomes")
def what_fails(server): checks.equal("two", 2, 3)
def what_ends_the_program(server): os._exit(3)

checks.run(what_fails, what_holds, *([what_ends_the_program] if sys.argv[1] == "ends" else []))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(dtype="float32") as server:
        yield server


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_all_checks_hold_of_the_clients_that_are_installed(name: str, server: Served) -> None:
    assert CLIENTS[name].version == importlib.metadata.version(name)
    found = list(outcomes(CLIENTS[name], Path(sys.executable), server.address))
    assert len(found) > 5
    assert not [str(outcome) for outcome in found if outcome.error]


@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_is_pinned_and_has_its_program(name: str) -> None:
    client = CLIENTS[name]
    assert (check_clients.PROGRAMS / client.program).is_file()
    assert all("==" in requirement for requirement in client.requirements)


@pytest.mark.parametrize("ends", [False, True])
def test_a_check_that_fails_stops_no_other(ends: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(check_clients.PROGRAMS / "checks.py", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(check_clients, "PROGRAMS", tmp_path)
    found = list(outcomes(Client("program.py", ("it==1",)), Path(sys.executable), "ends" if ends else "address"))
    told = [str(outcome) for outcome in found]
    assert told[:2] == ["what fails: AssertionError: two: 2, and not 3", "what holds: ok"]
    assert told[2:] == (["the program: it ended with status 3; what it wrote is above"] if ends else [])


def wheel(folder: Path, version: str) -> str:
    """A package with nothing in it."""
    place = folder / f"nothing-{version}-py3-none-any.whl"
    about = f"nothing-{version}.dist-info"
    with zipfile.ZipFile(place, "w") as packed:
        packed.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: nothing\nVersion: {version}\n")
        packed.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{about}/RECORD", "")
    return str(place)


def test_an_environment_is_kept_until_its_versions_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def version(requirement: str) -> str:
        python = environment("nothing", Client("", (requirement,)), tmp_path, sys.executable)
        code = "import importlib.metadata; print(importlib.metadata.version('nothing'))"
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert version(wheel(tmp_path, "1.0")) == "1.0"
    mark = tmp_path / "nothing" / "mark"
    mark.touch()
    assert version(wheel(tmp_path, "1.0")) == "1.0"
    assert mark.exists()
    assert version(wheel(tmp_path, "2.0")) == "2.0"
    assert not mark.exists()
    with pytest.raises(subprocess.CalledProcessError):
        version("no-such-package==1")
    assert not (tmp_path / "nothing" / "stamp").exists()  # so that it is made again


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome("chat", None), 0), (Outcome("chat", "it does not hold"), 1)],
)
def test_the_table_has_every_client_and_the_status_tells_failure(
    outcome: Outcome, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def made(name: str, *_: object) -> Path:
        if name == "litellm":
            raise OSError("no room")
        return tmp_path

    served = types.SimpleNamespace(address="address")
    monkeypatch.setattr(check_clients, "served", lambda **_: contextlib.nullcontext(served))
    monkeypatch.setattr(check_clients, "environment", made)
    monkeypatch.setattr(check_clients, "outcomes", lambda *_: [outcome])

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check_clients", *words])
        with pytest.raises(SystemExit) as caught:
            check_clients.main()
        return int(caught.value.code), capsys.readouterr().out

    ended, printed = run("--only", "openai", "--only", "vllm")
    assert ended == status
    assert printed.splitlines()[0] == f"openai 3.51.0: {outcome}"
    assert f"{1 - status} of 1" in printed
    assert "vllm" in printed
    assert "litellm" not in printed
    ended, printed = run()
    assert ended == 1
    assert "cannot be made: no room" in printed
