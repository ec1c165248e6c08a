"""The comparison of engines: turns, ratios within a round, and a peer that fails."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from scripts import bench_peers

# Braces doubled, as in every command with places to fill; names that are the peer's own.
ANSWER = '{{"engine": "it", "workload": "some/even32.json", "run_s": 4.0, "output_tokens": 10}}'
PEER = f"{shlex.join([sys.executable, '-c', f'print(1); print({ANSWER!r})'])} {{model}} {{workload}}"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    own = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(bench_peers, "run_ours", lambda *_: {"run_s": next(own), "output_tokens": 10, "startup_s": 3.0})
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "model", "--workload", "some/even32.json", *words])
    bench_peers.main()


def test_each_ratio_is_of_one_round_and_the_table_has_their_medians(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "result.json"
    run(monkeypatch, "--engine", f"other={PEER}", "--rounds", "3", "--output-json", str(file))
    report = json.loads(file.read_text())
    assert [run["engine"] for run in report["runs"]] == ["jaxserve", "other"] * 3
    ours, other = report["medians"]
    assert (ours["seconds"], ours["tokens_per_second"], ours["startup_seconds"]) == (2.0, 5.0, 3.0)
    assert (other["seconds"], other["ratio"]) == (4.0, 2.0)  # the median of 4, 2 and 2
    assert "2.00" in capsys.readouterr().out


def test_a_peer_that_fails_ends_it_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no such model"):
        run(monkeypatch, "--engine", f"other={sys.executable} -c 'raise SystemExit(\"no such model\")'")
