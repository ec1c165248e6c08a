"""`jaxserve run-batch`: a file of requests, answered in one batch."""

import argparse
import asyncio
import contextlib
import io
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

from jaxserve.cli.flags import Parser
from jaxserve.cli.options import add_engine_flags, engine_config, follow
from jaxserve.errors import InputError
from jaxserve.progress import ProgressBars
from jaxserve.server.config import ServerConfig

_NO_LIMIT = 2**62  # the file is the queue


def parser() -> Parser:
    parser = Parser(
        "run-batch",
        "Answer a file of requests in OpenAI's batch format, all in one batch and without a server. Each line is\n"
        '{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}; the output has one line\n'
        "for each, in the same order, with the response or the error.",
        examples=(
            "jaxserve run-batch -i requests.jsonl -o results.jsonl",
            "jaxserve run-batch -i requests.jsonl -o results.jsonl --model ~/models/Qwen3-8B --max-num-seqs 128",
        ),
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="requests, one a line; - reads standard input"
    )
    files.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="results, one a line; - writes standard output"
    )
    files.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what requests call the model; the name of its directory if left out",
    )
    add_engine_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    config = engine_config(arguments)
    if config.process_id:
        follow(config)
        return
    _check_files(arguments.input_file, arguments.output_file)
    lines = _read(arguments.input_file)
    from jaxserve.server import logs  # on demand, as the web framework takes a moment
    from jaxserve.server.app import build_app
    from jaxserve.server.batch import BatchResult, run_batch
    from jaxserve.server.serve import served_name, started_engine

    server = ServerConfig(
        served_model_name=arguments.served_model_name,
        max_queued_requests=_NO_LIMIT,
        max_queued_tokens=_NO_LIMIT,
        log_level="warning",
    )
    logs.configure(server.log_level, server.log_format)

    counted: Counter[str] = Counter()
    with _open(arguments.output_file) as output, started_engine(config, server) as engine:
        if arguments.output_file != "-" and os.path.isfile(arguments.output_file):
            output.truncate(0)  # only now: an engine that does not start costs nobody the results of an earlier run
        app = build_app(engine, served_name(config, server), server)
        start = time.perf_counter()
        with ProgressBars() as bars:

            def write(result: BatchResult) -> None:
                print(result.to_json(), file=output, flush=True)
                counted.update(done=1, failed=int(result.failed), tokens=result.completion_tokens)
                bars("requests", counted["done"], len(lines))

            try:
                asyncio.run(run_batch(app, lines, write))
            except ExceptionGroup as group:  # what `write` raises comes in the group of the tasks
                raise group.exceptions[0] from group
        seconds = time.perf_counter() - start
    requests = f"{len(lines)} request{'s' * (len(lines) != 1)}, {counted['failed']} of them failed"
    tokens = counted["tokens"]
    print(f"{requests}, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def _check_files(source: str, target: str) -> None:
    """Refuse to write the results over the requests, however the file is called."""
    with contextlib.suppress(io.UnsupportedOperation):  # of a stream without a file
        files = [
            stream.fileno() if name == "-" else name for name, stream in ((source, sys.stdin), (target, sys.stdout))
        ]
        if all(map(os.path.isfile, files)) and os.path.samefile(*files):
            raise InputError(f"{source} and {target} are the same file; give another one for the results")


def _read(file: str) -> list[str]:
    """The lines of `file` that are not blank."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the requests of {file} ({error})") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{file} holds no requests; write one a line")
    return lines


def _open(file: str) -> contextlib.AbstractContextManager[TextIO]:
    """`file` to write to, with what is in it."""
    if file == "-":
        return contextlib.nullcontext(sys.stdout)
    try:
        return Path(file).open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the results to {file} ({error.strerror}); give another file") from error
