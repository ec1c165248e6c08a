"""What the programs of all clients share. They run in their client's environment: the standard library is all there is.

A program takes the server's address and the directory of the model that it serves, and tells of each check on a line.
"""

import dataclasses
import json
import os
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "demo_model"

# What the demo model has learned: an answer, and a function that it calls.
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
WEATHER_ASKED = "Please get the weather in Paris on Monday."
WEATHER_ARGUMENTS = {"city": "Paris", "day": "Monday"}
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city"},
            "day": {"type": "string", "description": "The day"},
        },
        "required": ["city", "day"],
    },
}
WEATHER_RESULT = "weather sunny, event 12"
WEATHER_ANSWER = "The result is: weather sunny, event 12."


@dataclasses.dataclass(frozen=True)
class Server:
    """The server that a client is checked against, and the way to it without a client."""

    address: str
    model_directory: Path  # for clients that count tokens themselves

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it answers a POST of `body`, or a GET."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)


def equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, and not {expected!r}")


def holds(what: str, condition: object) -> None:
    if not condition:
        raise AssertionError(f"it does not hold that {what}")


def refused(what: object, error: type[Exception], said: str, ask: Callable[[], object]) -> None:
    """Whether `ask` raises this error, whose message says so."""
    try:
        ask()
    except error as raised:
        holds(f"{raised} names {said}", said in str(raised))
    else:
        raise AssertionError(f"{what} was not refused")


def command(words: list[str], *, settings: dict[str, str], folder: Path) -> None:
    """Run a command of the client's, with `settings` in its environment and `folder` as its directory."""
    status = subprocess.run(words, env=os.environ | settings, cwd=folder).returncode
    if status:
        raise AssertionError(f"the command ended with status {status}; what it wrote is above")


def run(*checks: Callable[[Server], None]) -> None:
    """Run all checks, whatever becomes of the others: a line of JSON with the name and the outcome of each."""
    told = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the client itself prints
    server = Server(sys.argv[1], Path(sys.argv[2]))
    for check in checks:
        outcome = {"check": check.__name__.replace("_", " "), "error": None}
        try:
            check(server)
        except Exception as error:
            traceback.print_exc()
            outcome["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(outcome), file=told, flush=True)
