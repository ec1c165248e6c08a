"""`jaxserve bench simulate`: a long trace of requests on a simulated device, to compare settings in seconds."""

import argparse
import time

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Flags, Parser
from jaxserve.config import EngineConfig

_SHOWN = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_itl_ms", "max_decode_steps", "decode_burst_ms"),
    *("enable_prefix_caching", "page_size", "num_pages"),
)
_LEFT_OUT = [name for name in EngineConfig.__dataclass_fields__ if name not in _SHOWN]
SCHEDULING = Flags("scheduling", EngineConfig).without(*_LEFT_OUT)
_DEFAULTS = {
    "max_model_len": 8192,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "max_decode_steps": 8,
    "num_pages": 2048,
}


def parser() -> Parser:
    parser = Parser(
        "bench simulate",
        "Let random requests arrive at an engine whose device is simulated, on a clock of its own: minutes of traffic\n"
        "take seconds. Scheduling, paging and batching are real; a step takes as long as the cost model says.\n"
        "Run it with one setting changed to see what the setting does. The same seed gives the same requests.",
        examples=(
            "jaxserve bench simulate --requests 5000 --rate 8",
            "jaxserve bench simulate --requests 5000 --rate 8 --max-itl-ms 50",
            "jaxserve bench simulate --num-pages 500 --shared-prefix 512",
        ),
    )
    trace = parser.add_argument_group("requests")
    for flag, default, help in (
        ("--requests", 2000, "how many arrive"),
        ("--input-len", 512, "mean tokens of a prompt, log-normal"),
        ("--output-len", 128, "mean tokens of a completion, log-normal"),
    ):
        trace.add_argument(flag, type=positive, default=default, metavar="N", help=f"{help} (default: {default})")
    trace.add_argument("--rate", type=float, default=8.0, metavar="X", help="arrivals a second (default: 8.0)")
    trace.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    trace.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (default: 0)")
    cost = parser.add_argument_group(
        "cost of a step, in milliseconds (by default about those of an 8B model on an H200)"
    )
    for flag, milli, help in (
        ("--per-pass", 4.5, "for reading the weights once"),
        ("--per-prefill-token", 0.03, "for each prompt token"),
        ("--per-decode-row", 0.01, "for each decoding sequence"),
        ("--per-position-read", 4e-5, "for each position whose keys and values a decoding sequence reads"),
    ):
        cost.add_argument(flag, type=float, default=milli, metavar="X", help=f"{help} (default: {milli})")
    shown = {name: str(value) for name, value in _DEFAULTS.items()}
    SCHEDULING.add_to(parser, shown_defaults=shown)
    return parser


def run(arguments: argparse.Namespace) -> None:
    import numpy as np  # on demand, as JAX comes with these
    from rich.console import Console

    from jaxserve.cli.bench.measurement import summary
    from jaxserve.cli.bench.report import milliseconds, statistics_table
    from jaxserve.engine.simulation import Arrival, serve_trace, simulated_engine
    from jaxserve.runner.simulated import CostModel

    settings = _DEFAULTS | SCHEDULING.given(arguments)
    random = np.random.default_rng(arguments.seed)
    half = int(settings["max_model_len"]) // 2
    prefix = random.integers(30_000, size=min(arguments.shared_prefix, half)).tolist()

    def lengths(mean: int) -> list[int]:
        drawn = random.lognormal(np.log(mean) - 0.5, 1.0, arguments.requests)  # of this mean, with a long tail
        return np.clip(drawn, 1, half - len(prefix) // 2 - 1).astype(int).tolist()

    times = np.cumsum(random.exponential(1 / arguments.rate, arguments.requests)).tolist()
    shapes = zip(times, lengths(arguments.input_len), lengths(arguments.output_len), strict=True)
    trace = [
        Arrival(at, (prefix + random.integers(30_000, size=prompt).tolist())[: half - 1], output)
        for at, prompt, output in shapes
    ]
    cost = CostModel(
        *(
            getattr(arguments, name) / 1000
            for name in ("per_pass", "per_prefill_token", "per_decode_row", "per_position_read")
        )
    )
    engine, runner = simulated_engine(cost, **settings)
    start = time.perf_counter()
    served = serve_trace(engine, runner, trace)
    taken = time.perf_counter() - start

    end, scheduler = runner.clock(), engine.scheduler
    table = statistics_table("milliseconds")
    for name, values in (
        ("time to first token (TTFT)", [request.ttft for request in served]),
        ("time between tokens given out", [gap for request in served for gap in request.gaps]),
        ("request from arrival to end", [request.times[-1] - request.arrival.time for request in served]),
    ):
        table.add_row(name, *map(milliseconds, (summary(values) or {}).values()))
    console = Console(highlight=False)
    console.print(table)
    tokens = sum(sum(request.counts) for request in served)
    hits = scheduler.prefix_cache_hits / max(1, scheduler.prefix_cache_queries)
    console.print(
        f"  {tokens / end:.0f} output tokens per second over {end:.0f} simulated seconds, {hits:.0%} of prompt tokens "
        f"from the prefix cache, {scheduler.num_preemptions} preemptions; simulated in {taken:.1f} s",
        soft_wrap=True,
    )
