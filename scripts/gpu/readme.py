"""README.md's section on GPUs, written from a result file: no number gets there but from a run."""

import json
from pathlib import Path
from typing import Any

from scripts.gpu.supervisor import shown

BEGIN, END = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"
# In this order; the others are in the result file.
TABLES = (
    *("ceilings", "decode", "prefill", "torch"),
    *("start", "attention", "decode steps", "prefill steps", "host", "graphs", "throughput"),
)


def write(result: Path, readme: Path) -> None:
    """Put `result`'s section between the markers in `readme`."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} does not hold {BEGIN} and {END} once each; put them where the section belongs")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{section(json.loads(result.read_text()), result.name)}\n{END}{after}")


def section(data: dict[str, Any], file_name: str) -> str:
    tables = [data["tables"][name] for name in TABLES if data["tables"].get(name, {}).get("rows")]
    return "\n\n".join([_about(data, file_name), _correctness(data), *map(_markdown, tables)])


def _about(data: dict[str, Any], file_name: str) -> str:
    facts = data["facts"]
    smi = facts.get("nvidia_smi", {})
    device = smi.get("name") or facts.get("device", "an unknown device")
    versions = ", ".join(
        f"{name} {version}" for name, version in facts.get("versions", {}).items() if "jax" in name and version
    )
    driver = f", driver {smi['driver_version']}" if "driver_version" in smi else ""
    return (
        f"{device}{driver}, {facts.get('platform_version', 'version unknown')}; {versions}; commit "
        f"{data.get('commit') or 'unknown'}, {data['date'][:10]}. Written by `scripts/gpu_check.py`; all rows, and "
        f"what could not be run, are in `scripts/results/{file_name}`."
    )


def _correctness(data: dict[str, Any]) -> str:
    rows = [row for name, table in data["tables"].items() if name.startswith("correct") for row in table["rows"]]
    failures = data["failures"]
    right = sum(row["ok"] for row in rows)
    checked = f"Kernels against float64: {right} of {len(rows)} cases right." if rows else "No kernel was checked."
    if not failures:
        return f"{checked} Nothing failed."
    named = "; ".join(f"{failure['part']}, {failure['case'] or 'the part itself'}" for failure in failures)
    return f"{checked} Failed: {named}."


def _markdown(table: dict[str, Any]) -> str:
    heads = ["", *(f"{name}, {unit}" if unit else name for name, unit in table["units"].items())]
    rows = [[row["case"], *(shown(row.get(name)) for name in table["units"])] for row in table["rows"]]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    note = f" {table['note']}" if table["note"] else ""
    return f"**{table['title']}.**{note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
