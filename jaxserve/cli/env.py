"""`jaxserve env`: versions, devices and the CPU's features, for a look or a bug report."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxserve.cli import machine
from jaxserve.cli.flags import Parser
from jaxserve.config import EngineConfig

_GIB = 2**30


def parser() -> Parser:
    parser = Parser(
        "env",
        "Show versions, devices and the CPU's features. What it prints belongs into every bug report.",
        examples=("jaxserve env", "jaxserve env --json"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # to look at a GPU is not to take its memory
    facts = {
        "versions": machine.versions(),
        "host": machine.host(),
        "devices": machine.devices(),
        "compilation_cache": _compilation_cache(),
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _compilation_cache() -> dict[str, Any]:
    directory = Path(EngineConfig.compilation_cache_dir).expanduser()
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {"directory": str(directory), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def _print(facts: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value))

    for name, version in facts["versions"].items():
        add(name, version or "not installed")
    host, cache = facts["host"], facts["compilation_cache"]
    add("system", host["system"])
    add("cpu", f"{host['cpu']}, {host['cores']} cores")
    add("cpu features", " ".join(host["cpu_features"]) or "none of note")
    add("memory", f"{host['memory_bytes'] / _GIB:.1f} GiB")
    for device in facts["devices"]:
        memory = f", {device['memory_bytes'] / _GIB:.1f} GiB for JAX" if device["memory_bytes"] else ""
        add(f"device {device['id']}", f"{device['platform']}, {device['kind']}{memory}")
    add("compiled programs", f"{cache['directory']}, {cache['files']} files, {cache['bytes'] / _GIB:.2f} GiB")
    Console(highlight=False).print(table)
