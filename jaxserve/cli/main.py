"""`jaxserve`: finds the command, runs it, and puts what the user has to mend on one line."""

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jaxserve
from jaxserve.cli.flags import Parser
from jaxserve.errors import InputError, nearest

# Each command's module has `parser()` and `run(arguments)`; it is imported once it is called.
COMMANDS = {
    "generate": ("jaxserve.cli.generate", "complete prompts, all in one batch"),
    "chat": ("jaxserve.cli.chat", "talk to a model in the terminal"),
    "serve": ("jaxserve.cli.serve", "answer OpenAI's API over HTTP"),
    "run-batch": ("jaxserve.cli.run_batch", "answer a file of requests in OpenAI's batch format"),
    "plan": ("jaxserve.cli.plan", "on which GPUs a model fits, and how many requests at a time"),
    "convert": ("jaxserve.cli.convert", "HuggingFace directories to Orbax checkpoints, and back"),
    "bench throughput": ("jaxserve.cli.bench.throughput", "many requests at once: tokens per second"),
    "bench latency": ("jaxserve.cli.bench.latency", "one batch again and again: time to first token and per token"),
    "bench context": ("jaxserve.cli.bench.context", "long prompts: time, bandwidth, and what others wait"),
    "bench load": ("jaxserve.cli.bench.load", "a checkpoint onto the devices: bytes per second and memory"),
    "bench serve": ("jaxserve.cli.bench.serve", "many streams over HTTP, and what HTTP costs"),
    "bench host": ("jaxserve.cli.bench.host", "what a decode step costs beside the device's work"),
    "bench simulate": ("jaxserve.cli.bench.simulate", "a long trace on a simulated device, to compare settings"),
    "bench experts": ("jaxserve.cli.bench.experts", "a mixture of experts: time by how many experts a step uses"),
    "bench structured": ("jaxserve.cli.bench.structured", "what constrained requests cost those beside them"),
    "bench pages": ("jaxserve.cli.bench.pages", "what sequences hold of the page pool, by context length"),
    "env": ("jaxserve.cli.env", "show versions, devices and the CPU's features"),
}

_FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or what one may have of it


class _ClosedInput(io.TextIOBase):
    """Stands for a standard input that is closed, so that only commands that read it hear of it."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise InputError("standard input is closed; give it a file or a terminal, or < /dev/null")

    isatty = read = readline = _refuse


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for what is the user's to mend."""
    try:
        _check_streams()
        try:
            return _run(sys.argv[1:] if words is None else words)
        finally:
            sys.stdout.flush()  # of help too, so that what goes wrong with it is said below
    except InputError as error:
        print(f"jaxserve: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left; Python would complain again when it closes stdout
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop_output()
        print(f"jaxserve: the output could not all be written ({error.strerror}); make room for it", file=sys.stderr)
        return 1


def _check_streams() -> None:
    """Refuse a closed standard output, and have a closed standard input refused when it is read; Python has None."""
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)  # has its descriptor, or else the engine's socket would, and be lost to it
        sys.stdin = _ClosedInput()
    if sys.stderr is None:  # what is printed to None goes to standard output
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.set_inheritable(descriptor, True)  # the engine's process writes its log there too
        sys.stderr = os.fdopen(descriptor, "w")
    if sys.stdout is None:
        raise InputError("standard output is closed; leave it open, or send it to /dev/null")


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: Sequence[str]) -> int:
    for length in (2, 1):
        command = " ".join(words[:length])
        if command in COMMANDS:
            module = importlib.import_module(COMMANDS[command][0])
            module.run(module.parser().parse(words[length:]))
            return 0
    return _run_without_command(words)


def _run_without_command(words: Sequence[str]) -> int:
    """`jaxserve --help`, `jaxserve bench --help`, `jaxserve --version`, or a command that does not exist."""
    groups = {command.split()[0] for command in COMMANDS if " " in command}
    group = words[0] if words and words[0] in groups else ""
    rest = words[1:] if group else words
    if rest and not rest[0].startswith("-"):
        named = f"{group} {rest[0]}".strip()
        raise InputError(f"there is no command {named!r}{nearest(named, COMMANDS) or '; see jaxserve --help'}")
    parser = _overview(group)
    parser.parse(rest)
    parser.print_help()
    return 0


def _overview(group: str) -> Parser:
    shown = {name: summary for name, (_, summary) in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in shown.items())
    parser = Parser(
        group,
        f"Serve large language models with JAX.\n\ncommands:\n{commands}\n\n"
        "jaxserve COMMAND --help explains each. Without --model, a small demo model answers that ships inside.",
        takes="COMMAND",
        examples=("jaxserve bench latency --input-len 256 --output-len 64",)
        if group
        else ('jaxserve generate --chat "What is 27+45?"', "jaxserve chat", "jaxserve serve --port 8000"),
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {jaxserve.__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
