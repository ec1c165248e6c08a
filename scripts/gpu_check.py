"""Check and measure jaxserve on an NVIDIA GPU: one command, useful from its first minute.

python scripts/gpu_check.py                        # everything, in 8 minutes
python scripts/gpu_check.py correctness ceilings   # some parts
python scripts/gpu_check.py engine --budget 5m
python scripts/gpu_check.py --device cpu           # the same at toy size: does the script itself work?
python scripts/gpu_check.py readme scripts/results/RESULT.json   # write a result into README.md
"""

import argparse
import datetime
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not

from scripts.gpu import readme  # noqa: E402
from scripts.gpu.parts import PARTS  # noqa: E402
from scripts.gpu.supervisor import Record, run_parts, say  # noqa: E402

# What the parts import beside the standard library, by module, with the name that pip knows it by.
NEEDED = {
    **{name: name for name in ("jax", "flax", "numpy", "transformers", "tokenizers", "safetensors", "rich", "jinja2")},
    **{name: name for name in ("msgspec", "ml_dtypes", "huggingface_hub")},
    "yaml": "pyyaml",
}

EPILOG = f"""\
parts:
{chr(10).join(f"  {name:<12}{part.summary}" for name, part in PARTS.items())}

Each part runs in a process of its own. A case that fails, hangs or kills its process is shown and recorded, the part
goes on behind it, and the exit status is 1 at the end. Each part has its share of --budget, and what it leaves over
goes to those behind it; cases that find their time spent are listed as not run. The result file is written after each
row, so that a run which is cut short has its numbers too. Where a machine is lent for longer, run the parts alone:
correctness --budget 5m, then ceilings kernels --budget 9m, then ceilings engine --budget 9m.

How it measures is said at the top of scripts/gpu/timing.py, what each table counts above the table itself.

A machine without a network: the parts need
{textwrap.fill(", ".join(NEEDED.values()), 110)}.
What it lacks travels as wheels. Where there is a network, make a folder of them that git ignores (the versions are
those of requirements.lock; name what is missing and what it needs in turn; JAX's CUDA packages are too large to carry):

  echo /.wheels/ >> .git/info/exclude
  python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
      --dest .wheels msgspec==0.22.0 rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 pygments==2.21.0 pyyaml==6.0.3

and there, into a folder of their own, so that nothing that is installed changes:

  python -m pip install --quiet --no-index --no-deps --find-links .wheels --target /tmp/site \\
      msgspec rich markdown-it-py mdurl pygments pyyaml
  PYTHONPATH=/tmp/site python scripts/gpu_check.py
"""


def seconds(text: str) -> float:
    """For argparse: `8m`, `90s` or a number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 8m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2] or "s"]


def parser() -> argparse.ArgumentParser:
    summary, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=f"{summary}\n{examples}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run, in their own order; all if left out")
    parser.add_argument("--budget", type=seconds, default=480.0, metavar="TIME", help="for all parts together (8m)")
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="cpu runs every part at toy size (default: gpu)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="result file; scripts/results/DATE-DEVICE.json if left out"
    )
    parser.add_argument("--commit", help="of the code under test, where there is no git to ask")
    return parser


def main(words: list[str]) -> int:
    if words[:1] == ["readme"]:
        if len(words) != 2:
            print("give one result file: gpu_check.py readme RESULT.json", file=sys.stderr)
            return 2
        readme.write(Path(words[1]), ROOT / "README.md")
        return 0
    arguments = parser().parse_args(words)
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        print(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"missing here: {', '.join(missing)}; --help says how to bring them as wheels", file=sys.stderr)
        return 2
    names = [name for name in PARTS if not arguments.parts or name in arguments.parts]
    now = datetime.datetime.now(datetime.UTC)
    output = arguments.output or ROOT / "scripts" / "results" / f"{now:%Y-%m-%d-%H%M}-{arguments.device}.json"
    record = Record(
        output,
        date=now.isoformat(timespec="seconds"),
        commit=arguments.commit or _commit(),
        parts=names,
        budget_seconds=arguments.budget,
    )
    try:
        run_parts(names, device=arguments.device, seconds=arguments.budget, record=record)
    except KeyboardInterrupt:
        say("\nstopped")
    return summary(record)


def _commit() -> str | None:
    """Of this checkout, with a mark where it holds changes; None where git cannot say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(record: Record) -> int:
    """Print what went wrong; returns the exit status."""
    failures, not_run = record.data["failures"], record.data["not_run"]
    rows = sum(len(table["rows"]) for table in record.data["tables"].values())
    say(f"\n{rows} rows, {len(failures)} failures, {len(not_run)} not run; written to {record.path}")
    for failure in failures:
        error = failure["error"].splitlines()[0][:200]
        say(f"  FAILED {failure['part']}: {failure['case'] or 'the part itself'}: {error}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
