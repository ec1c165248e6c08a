"""What a benchmark asks of the engine: prompts of token ids, each with the number of tokens to answer it with."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.errors import InputError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM


RANDOM = "random token ids"


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    prompt_token_ids: list[int]
    max_tokens: int

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + self.max_tokens


def add_bench_flags(
    parser: argparse.ArgumentParser, count_flag: str, count: int, *, input_len: int, output_len: int
) -> None:
    """What the benchmarks of an engine in this process take: a workload, and `--profile`."""
    add_workload_flags(parser, count_flag, count, input_len=input_len, output_len=output_len)
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help="write a trace of the measured run there, for ui.perfetto.dev (perfetto_trace.json.gz) and XProf",
    )


def add_workload_flags(
    parser: argparse.ArgumentParser, count_flag: str, count: int, *, input_len: int, output_len: int
) -> None:
    """`--input-len`, `--output-len` and `count_flag`, or `--workload`; and `--output-json`."""
    group = parser.add_argument_group("workload")
    for flag, default, help in (
        (count_flag, count, "requests that are sent"),
        ("--input-len", input_len, "tokens of each prompt; they are random, after --seed"),
        ("--output-len", output_len, "tokens of each completion; end-of-sequence is ignored"),
    ):
        # No default for argparse, so that one beside --workload can be refused.
        group.add_argument(flag, type=positive, metavar="N", help=f"{help} (default: {default})")
    group.add_argument(
        "--workload",
        metavar="FILE",
        help='instead of these: a JSON list of {"prompt_token_ids": [...], "max_tokens": n}',
    )
    parser.add_argument(
        "--output-json", metavar="FILE", help="write all numbers, the settings and the machine to this file"
    )
    parser.set_defaults(synthetic={count_flag: count, "--input-len": input_len, "--output-len": output_len})


class Workload:
    """What the flags ask for: the requests of a file, or random ones, which are others at each draw."""

    def __init__(self, arguments: argparse.Namespace):
        given = {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in arguments.synthetic}
        for flag, value in given.items():
            if value is not None and arguments.workload:
                raise InputError(f"{flag} and --workload were both given; the file says what to run, so leave one out")
        self.source = arguments.workload or RANDOM
        self._shape = [given[flag] or default for flag, default in arguments.synthetic.items()]
        self._requests = read_workload(arguments.workload) if arguments.workload else None

    def draw(self, vocab_size: int, random: np.random.Generator) -> list[BenchRequest]:
        if self._requests is not None:
            return self._requests
        count, input_len, output_len = self._shape
        return [BenchRequest(random.integers(vocab_size, size=input_len).tolist(), output_len) for _ in range(count)]


def read_workload(file: str) -> list[BenchRequest]:
    try:
        entries = json.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"cannot read the workload {file} ({error})") from error
    try:
        requests = [BenchRequest(list(entry["prompt_token_ids"]), entry["max_tokens"]) for entry in entries]
        if requests and all(type(request.max_tokens) is int and request.max_tokens > 0 for request in requests):
            return requests
    except (TypeError, KeyError):
        pass
    raise InputError(f'{file} is no workload; write a JSON list of {{"prompt_token_ids": [...], "max_tokens": n}}')


def check_lengths(requests: Sequence[BenchRequest], max_model_len: int) -> None:
    """No request may be cut short: the numbers would be of other work than was asked for."""
    longest = max(request.length for request in requests)
    if longest > max_model_len:
        raise InputError(
            f"the longest request has {longest} tokens, prompt and completion together, and max_model_len is "
            f"{max_model_len}; shorten it or raise --max-model-len"
        )


def run_requests(llm: "LLM", requests: Sequence[BenchRequest]) -> list[RequestOutput]:
    """Send all requests at once; every completion comes out at its full length."""
    params = [
        SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True, detokenize=False) for r in requests
    ]
    return llm.generate([{"prompt_token_ids": r.prompt_token_ids} for r in requests], params)


def positive(text: str) -> int:
    """For argparse: an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1 on")
    return int(text)
