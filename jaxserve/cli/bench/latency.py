"""`jaxserve bench latency`: one batch, again and again."""

import argparse

from jaxserve.cli.bench.workload import add_bench_flags, positive, run_requests
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import BENCH_ENGINE, add_engine_flags


def parser() -> Parser:
    parser = Parser(
        "bench latency",
        "Send one request, or one batch, again and again to an engine in this process, and print how long its\n"
        "user waits: to the first token, for each token after it, and to the end. Prompts are token ids, and\n"
        "completions go on after end-of-sequence, so that every run does the same work.",
        examples=(
            "jaxserve bench latency",
            "jaxserve bench latency --model ~/models/Qwen3-8B --input-len 1024 --output-len 128 --batch-size 8",
            "jaxserve bench latency --workload single.json --num-iters 5 --output-json result.json",
        ),
    )
    add_bench_flags(parser, "--batch-size", 1, input_len=256, output_len=64)
    parser.add_argument(
        "--num-iters", type=positive, default=10, metavar="N", help="times that the batch is measured (default: 10)"
    )
    parser.add_argument(
        "--num-iters-warmup", type=positive, default=2, metavar="N", help="times that it runs before that (default: 2)"
    )
    add_engine_flags(parser, BENCH_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from jaxserve.cli.bench.report import print_report  # on demand, as JAX comes with these
    from jaxserve.cli.bench.session import Session, write_report

    with Session(arguments) as session:
        for _ in range(arguments.num_iters_warmup):
            run_requests(session.llm, session.draw())
        report = {"benchmark": "latency"} | session.measure([session.draw() for _ in range(arguments.num_iters)])
    print_report("latency", report)
    write_report(report, arguments.output_json)
