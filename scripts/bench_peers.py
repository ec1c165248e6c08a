"""Run jaxserve and other engines in turn on the same workloads and print one table with the ratios.

    python scripts/bench_peers.py MODEL --workload single.json --workload even32.json \\
        --engine vllm='vllm/bin/python run_peer.py vllm {model} {workload}' \\
        --engine llama.cpp='llamacpp/bin/python run_peer.py llamacpp {model}.gguf {workload}'

Each engine is a command whose last line of output is a JSON object with `run_s` and `output_tokens`; {model} and
{workload} are filled in. Machines are noisy, so the engines take turns, and each ratio is of runs of one round; what is
printed are medians over the rounds. A workload is a JSON list of {"prompt_token_ids": [...], "max_tokens": n}.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

OURS = "jaxserve"


def run_ours(model: str, workload: str, settings: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        words = ["bench", "throughput", "--model", model, "--workload", workload, "--output-json", str(report)]
        _run([sys.executable, "-m", "jaxserve.cli.main", *words, *settings])
        found = json.loads(report.read_text())
    if found["compilations_after_warm_up"]:
        raise SystemExit(f"{found['compilations_after_warm_up']} programs were compiled during {workload}")
    return {
        "run_s": found["run_seconds"],
        "output_tokens": found["output_tokens"],
        "startup_s": found["startup"]["seconds"],
        "decode": found["bandwidth"]["decode"],
        "memory": found["bandwidth"]["memory"],
    }


def run_peer(command: str, model: str, workload: str) -> dict[str, Any]:
    printed = _run(shlex.split(command.format(model=model, workload=workload)))
    return json.loads(printed.strip().splitlines()[-1])


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="HuggingFace model directory")
    parser.add_argument("--workload", action="append", required=True, metavar="FILE", help="repeat for several")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=COMMAND", help="a peer; repeat")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each engine (default: 3)")
    parser.add_argument("--settings", default="--max-model-len 2048", help="jaxserve's flags (default: %(default)s)")
    parser.add_argument("--output-json", metavar="FILE", help="write every run and the medians to this file")
    arguments = parser.parse_args()
    commands = dict(engine.split("=", 1) for engine in arguments.engine)

    runs: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for workload in arguments.workload:
            for engine in (OURS, *commands):
                if engine == OURS:
                    result = run_ours(arguments.model, workload, shlex.split(arguments.settings))
                else:
                    result = run_peer(commands[engine], arguments.model, workload)
                runs.append(result | {"round": number, "workload": Path(workload).stem, "engine": engine})
                rate = result["output_tokens"] / result["run_s"]
                print(
                    f"round {number + 1}, {Path(workload).stem}, {engine}: {result['run_s']:.2f} s, {rate:.1f} tokens/s"
                )
                sys.stdout.flush()

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("workload", "engine", "seconds", "output tokens/s", f"{OURS} is faster by", "start-up s"):
        table.add_column(column, justify="left" if column in ("workload", "engine") else "right")
    medians = []
    for workload in (Path(file).stem for file in arguments.workload):
        own = {run["round"]: run["run_s"] for run in runs if (run["workload"], run["engine"]) == (workload, OURS)}
        for engine in (OURS, *commands):
            found = [run for run in runs if (run["workload"], run["engine"]) == (workload, engine)]
            median = {
                "workload": workload,
                "engine": engine,
                "seconds": statistics.median(run["run_s"] for run in found),
                "tokens_per_second": statistics.median(run["output_tokens"] / run["run_s"] for run in found),
                "ratio": statistics.median(run["run_s"] / own[run["round"]] for run in found),
                "startup_seconds": statistics.median(run.get("startup_s", 0.0) for run in found),
            }
            medians.append(median)
            ratio = "" if engine == OURS else f"{median['ratio']:.2f}"
            cells = (f"{median['seconds']:.2f}", f"{median['tokens_per_second']:.1f}", ratio)
            table.add_row(workload, engine, *cells, f"{median['startup_seconds']:.1f}")
    Console().print(table)
    if arguments.output_json:
        Path(arguments.output_json).write_text(json.dumps({"medians": medians, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
