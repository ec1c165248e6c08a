"""`jaxserve bench throughput`: many requests at once."""

import argparse

from jaxserve.cli.bench.workload import BenchRequest, add_bench_flags, run_requests
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import BENCH_ENGINE, add_engine_flags

_WARM_UP = [BenchRequest([1] * 8, 8)] * 2


def parser() -> Parser:
    parser = Parser(
        "bench throughput",
        "Send many requests at once to an engine in this process, and print what came out of it a second. Prompts\n"
        "are token ids, and completions go on after end-of-sequence, so that every run does the same work. Times\n"
        "to the first token include the wait for a place in the batch.",
        examples=(
            "jaxserve bench throughput",
            "jaxserve bench throughput --model ~/models/Qwen3-8B --num-prompts 512 --input-len 1024 --output-len 256",
            "jaxserve bench throughput --workload mixed48.json --output-json result.json",
        ),
    )
    add_bench_flags(parser, "--num-prompts", 32, input_len=256, output_len=128)
    add_engine_flags(parser, BENCH_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from jaxserve.cli.bench.report import print_report  # on demand, as JAX comes with these
    from jaxserve.cli.bench.session import Session, write_report

    with Session(arguments) as session:
        requests = session.draw()
        run_requests(session.llm, _WARM_UP)  # nothing is left to compile, but much runs for the first time
        report = {"benchmark": "throughput"} | session.measure([requests])
    print_report("throughput", report)
    write_report(report, arguments.output_json)
