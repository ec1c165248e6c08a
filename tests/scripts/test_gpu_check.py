"""The GPU check without a GPU: every part at toy size, and what becomes of cases that go wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_check
from scripts.gpu import readme, supervisor
from scripts.gpu.engine import count_graphs
from scripts.gpu.parts import PARTS, Part

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[dict, str]:
    """What the whole check finds on this CPU, and what it prints."""
    output = tmp_path_factory.mktemp("gpu_check") / "result.json"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--budget", "20m", "--commit", "abc"]
    run = subprocess.run([*command, "--output", output], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(output.read_text()), run.stdout


def test_every_part_runs_on_a_cpu(result):
    found, printed = result
    assert found["failures"] == []
    assert found["commit"] == "abc"
    assert found["facts"]["platform"] == "cpu"
    assert found["facts"]["versions"]["jax"]
    assert list(found["part_seconds"]) == list(PARTS)
    for name, table in found["tables"].items():
        assert table["title"] in printed
        for row in table["rows"]:
            assert row.keys() <= {"case", *table["units"]}, name  # no number without its unit
            assert row["case"] in printed
    # Nothing is left out but what takes a GPU or PyTorch.
    assert {case["table"] for case in found["not_run"]} <= {"torch", "graphs", "trace"}
    filled = {name for name, table in found["tables"].items() if table["rows"]}
    assert found["tables"].keys() - filled <= {"torch", "graphs", "trace"}


def test_numbers_are_those_of_the_work_done(result):
    tables = result[0]["tables"]
    assert all(row["ok"] for name, table in tables.items() if name.startswith("correct") for row in table["rows"])
    ceiling = max(row["GB/s"] for row in tables["ceilings"]["rows"] if row["case"].startswith("read"))
    for row in tables["decode"]["rows"]:
        moved = 4 * 64 * 2 * 2 * 2 * 64  # batch, context, K and V, KV heads, bytes, head size
        assert row["GB/s"] == pytest.approx(moved / row["time"] / 1e3)
        assert row["share"] == pytest.approx(100 * row["GB/s"] / ceiling)
    (throughput,) = tables["throughput"]["rows"]
    assert throughput["done"] == throughput["requests"]
    assert throughput["output tok/s"] * throughput["seconds"] == pytest.approx(throughput["requests"] * 10)
    assert throughput["compiled"] == 0


@pytest.fixture
def broken(monkeypatch, tmp_path) -> supervisor.Record:
    part = Part("tests.scripts.broken_part", 1, "goes wrong")
    monkeypatch.setitem(PARTS, "broken", part)
    # The worker looks the part up in a process of its own.
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\nfrom scripts.gpu import parts, worker\n"
        f"parts.PARTS['broken'] = parts.Part({part.module!r}, 1, '')\nworker.main(sys.argv[1], int(sys.argv[2]))\n"
    )
    monkeypatch.setattr(supervisor, "WORKER", [str(worker)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return supervisor.Record(tmp_path / "result.json", date="2026-01-01", commit=None)


def test_a_part_goes_on_behind_cases_that_fail_die_hang_or_lose_the_device(broken, capsys):
    supervisor.run_parts(["broken"], device="cpu", seconds=500, record=broken)
    found = json.loads(broken.path.read_text())
    assert [row["case"] for row in found["tables"]["broken"]["rows"]] == ["first", "wrong", "last"]
    assert {failure["case"]: failure["error"] for failure in found["failures"]} == {
        "raises": "ValueError: no such kernel",
        "kills its process": "its process ended with code 11",
        "wrong": "the result is wrong",
        "hangs": "no answer within 1 s",
        "loses its device": "its process ended with code 70",
    }
    assert [(case["case"], case["why"]) for case in found["not_run"]] == [
        ("left out", "it does not fit"),
        ("hangs as well", "slow hung in a case before"),
    ]
    assert gpu_check.summary(broken) == 1
    assert "FAILED broken: hangs: no answer within 1 s" in capsys.readouterr().out


def test_what_the_budget_leaves_no_time_for_is_said(broken):
    supervisor.run_parts(["broken"], device="cpu", seconds=0, record=broken)
    assert {case["why"] for case in broken.data["not_run"]} == {"the budget is spent"}
    assert len(broken.data["not_run"]) == 9
    assert gpu_check.summary(broken) == 0


def test_toy_sizes_are_not_taken_for_a_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is one
    record = supervisor.Record(tmp_path / "result.json", date="2026-01-01", commit=None)
    supervisor.run_parts(["ceilings"], device="gpu", seconds=100, record=record)
    assert [failure["part"] for failure in record.data["failures"]] == ["ceilings"]
    assert record.data["tables"] == {}


def test_rates_of_one_part_are_known_to_the_next(broken):
    broken.data["tables"]["ceilings"] = {
        "name": "ceilings",
        "rows": [{"case": "read, a", "GB/s": 3.0}, {"case": "read, b", "GB/s": 4.0}],
    }
    supervisor.run_parts(["broken"], device="cpu", seconds=500, record=broken)
    assert broken.data["tables"]["broken"]["rows"][-1]["time"] == 4e9


def test_graphs_are_counted_in_xlas_listing():
    listing = """\
000: kCommandBuffer [source | next=020 (1)]
    001: kCustomKernel [source | sink] fusion grid: [1, 1, 1]
    002: kCopy         [prev=001 (1) | sink] kCopy
003: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    004: kCustomKernel [source | sink] wrapped_compare
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source | sink] loop_and_fusion
006: kCustomKernel [source | sink] last
"""
    assert count_graphs(listing) == {"graphs": 2, "kernels in": 3, "outside": 2, "loops": 1, "branches": 0}


@pytest.mark.parametrize(("text", "expected"), [("8m", 480), ("90s", 90), ("1h", 3600), ("30", 30), ("1.5m", 90)])
def test_budgets(text, expected):
    assert gpu_check.seconds(text) == expected


def test_what_cannot_be_run_is_refused_in_a_sentence(capsys):
    assert gpu_check.main(["kernel"]) == 2
    assert "there is no part 'kernel'; parts are correctness, ceilings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["--budget", "soon"])
    assert "'soon' is no time" in capsys.readouterr().err


def test_the_readme_holds_what_a_run_found_and_nothing_else(result, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    output = tmp_path / "result.json"
    output.write_text(json.dumps(result[0]))
    readme.write(output, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    rows = result[0]["tables"]["decode steps"]["rows"]
    assert f"| {rows[0]['case']} | {supervisor.shown(rows[0]['time'])} |" in text
    assert "commit abc" in text
    checked = sum(len(table["rows"]) for name, table in result[0]["tables"].items() if name.startswith("correct"))
    assert f"{checked} of {checked} cases right. Nothing failed." in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="does not hold"):
        readme.write(output, page)


def test_readmes_section_is_of_a_result_that_is_here():
    """Numbers in README.md come from a file in scripts/results, or there are none."""
    section = (ROOT / "README.md").read_text().partition(readme.BEGIN)[2].partition(readme.END)[0]
    if "Not yet run on a GPU" in section:
        assert "|" not in section
        return
    found = [file for file in (ROOT / "scripts" / "results").glob("*.json") if file.name in section]
    assert section.strip() == readme.section(json.loads(found[0].read_text()), found[0].name).strip()


def test_whatever_the_parts_import_is_asked_for():
    """A machine without a network would find out one import at a time."""
    program = (
        "import ast, importlib, sys\n"
        "from scripts.gpu.parts import PARTS\n"
        "for part in PARTS.values(): part.load()\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.partition('.')[0] in ('jaxserve', 'pallas_kernels', 'scripts') and module.__file__:\n"
        "        for node in ast.parse(open(module.__file__).read()).body:\n"
        "            if isinstance(node, ast.Import): print(*(alias.name for alias in node.names), sep='\\n')\n"
        "            if isinstance(node, ast.ImportFrom): print(node.module)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {line.partition(".")[0] for line in run.stdout.split()}
    own = {"jaxserve", "pallas_kernels", "scripts", "tests"}
    assert found - own - set(sys.stdlib_module_names) <= gpu_check.NEEDED.keys() | {"jaxlib"}  # JAX's own
