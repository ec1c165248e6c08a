"""Runs the parts, each in a process of its own, prints their tables as they grow, and keeps the record."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.gpu.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
WORKER = ["-m", "scripts.gpu.worker"]
GRACE = 60.0  # seconds that a case may run on when its part's time has ended
START_LIMIT = 180.0  # seconds for a process to import JAX and find its device
CASE_WIDTH = 60
COLUMN_WIDTH = 10


class Record:
    """Everything that was found, written to `path` after each event, so that a run cut short has its numbers too."""

    def __init__(self, path: Path, **about: Any):
        self.path = path
        self.data: dict[str, Any] = about | {"facts": {}, "tables": {}, "not_run": [], "failures": []}
        self._shown = ""

    def take(self, part: str, event: dict[str, Any]) -> None:
        """Add one event of a worker, and print it."""
        place = {"part": part, "table": event.get("table"), "case": event.get("case")}
        match event["event"]:
            case "facts":
                self.data["facts"] |= event["facts"]
            case "row":
                self._table(event["table"])["rows"].append({"case": event["case"]} | event["row"])
                if event["row"].get("ok") is False:
                    self.data["failures"].append(place | {"error": "the result is wrong"})
            case "not run":
                self.data["not_run"].append(place | {"why": event["why"]})
            case "failed":
                self.data["failures"].append(place | {"error": event["error"]})
        self._print(event)
        self.write()

    def begin(self, event: dict[str, Any]) -> None:
        columns = event["columns"]
        self.data["tables"].setdefault(columns["name"], columns | {"rows": []})

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def ceilings(self) -> dict[str, float]:
        """The highest rates measured: bytes and operations a second, as far as they are known."""
        rows = self.data["tables"].get("ceilings", {"rows": []})["rows"]
        found = {}
        for name, column, unit in (("read", "GB/s", 1e9), ("copy", "GB/s", 1e9), ("product", "TFLOP/s", 1e12)):
            rates = [row[column] * unit for row in rows if row["case"].startswith(name)]
            if rates:
                found[name] = max(rates)
        return found

    def _table(self, name: str) -> dict[str, Any]:
        return self.data["tables"][name]

    def _print(self, event: dict[str, Any]) -> None:
        if event["event"] == "facts":
            return
        if event.get("table") is None:
            say(f"  {event['error']}")
            return
        table = self._table(event["table"])
        if self._shown != table["name"]:
            self._shown = table["name"]
            say(f"\n{table['title']}" + (f"\n{table['note']}" if table["note"] else ""))
            heads = "".join(f"{f'{name} {unit}'.strip():>{width(name, unit)}}" for name, unit in table["units"].items())
            say(f"{'':<{CASE_WIDTH}}{heads}")
        if event["event"] == "row":
            row = event["row"]
            values = "".join(f"{shown(row.get(name)):>{width(name, unit)}}" for name, unit in table["units"].items())
            say(f"{event['case']:<{CASE_WIDTH}}{values}" + ("   WRONG" if row.get("ok") is False else ""))
        else:
            word = "FAILED: " + event["error"].splitlines()[0][:300] if event["event"] == "failed" else event["why"]
            say(f"{event['case']:<{CASE_WIDTH}}  {word}")


def say(text: str) -> None:
    print(text, flush=True)


def width(name: str, unit: str) -> int:
    return max(COLUMN_WIDTH, len(f"{name} {unit}".strip()) + 2)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclasses.dataclass
class _Watch:
    """What a worker is at, and how long its next event may take."""

    case: tuple[str, str] | None = None  # its table and name
    kernel: tuple[str, str] | None = None  # its table and what it runs
    hung: bool = False
    limit: float = START_LIMIT
    since: float = dataclasses.field(default_factory=time.monotonic)

    def begin(self, event: dict[str, Any], limit: float) -> None:
        self.case, self.kernel = (event["table"], event["case"]), (event["table"], event["kernel"])
        self.limit, self.since = limit, time.monotonic()

    def end(self) -> None:
        self.case, self.limit, self.since = None, START_LIMIT, time.monotonic()


def run_parts(names: Sequence[str], *, device: str, seconds: float, record: Record) -> None:
    """Share `seconds` out to the parts by weight; what one leaves over, the next ones have."""
    end = time.monotonic() + seconds
    for index, name in enumerate(names):
        share = PARTS[name].weight / sum(PARTS[later].weight for later in names[index:])
        granted = max(0.0, end - time.monotonic()) * share
        say(f"\n== {name}: {PARTS[name].summary} (at most {granted:.0f} s)")
        began = time.monotonic()
        _run_part(name, device, began + granted, record)
        record.data.setdefault("part_seconds", {})[name] = round(time.monotonic() - began, 1)
        record.write()


def _run_part(name: str, device: str, end: float, record: Record) -> None:
    """Run a part; behind a case that killed its process, or hung, it goes on in a new one."""
    done: list[tuple[str, str]] = []
    hung: list[tuple[str, str] | None] = []
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as folder:
        orders = {"device": device, "done": done, "hung": hung, "ceilings": record.ceilings(), "folder": folder}
        while True:
            watch = _Watch()
            error = _run_process(name, orders | {"seconds": end - time.monotonic()}, record, done, watch)
            if error is None:
                return
            table, case = watch.case or (None, None)
            record.take(name, {"event": "failed", "table": table, "case": case, "error": error})
            if watch.case is None:
                return
            done.append(watch.case)
            if watch.hung:
                hung.append(watch.kernel)
            say(f"  {name} goes on in a new process")


def _run_process(
    name: str, orders: dict[str, Any], record: Record, done: list[tuple[str, str]], watch: _Watch
) -> str | None:
    """Run a part until its process ends; `done` and `watch` follow it. Returns why it did not end well."""
    end = time.monotonic() + orders["seconds"]
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, *WORKER, name, str(write)],
        cwd=ROOT,
        env=PARTS[name].environment(orders["device"], orders["folder"]),
        stdin=subprocess.PIPE,
        pass_fds=[write],
    )
    os.close(write)
    with process.stdin as stdin:  # type: ignore[union-attr]
        stdin.write(json.dumps(orders).encode())
    try:
        with os.fdopen(read) as pipe:
            for event in _events(pipe, watch):
                if event["event"] == "begin":
                    watch.begin(event, min(event["limit"], end - time.monotonic() + GRACE))
                    record.begin(event)
                    continue
                if watch.case:
                    done.append(watch.case)
                watch.end()
                record.take(name, event)
        code = process.wait(timeout=START_LIMIT)
        return f"its process ended with code {code}" if code else None
    except TimeoutError:
        watch.hung = True
        return f"no answer within {watch.limit:.0f} s"
    except subprocess.TimeoutExpired:
        return "its process did not end"
    finally:
        process.kill()
        process.wait()


def _events(pipe: Any, watch: _Watch) -> Iterator[dict[str, Any]]:
    """A worker's events as they come; `TimeoutError` when one takes longer than `watch` allows."""
    buffer = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, watch.since + watch.limit - time.monotonic()))
        if not ready:
            raise TimeoutError
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from map(json.loads, lines)
