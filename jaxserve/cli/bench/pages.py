"""`jaxserve bench pages`: what sequences of a model hold of the page pool, by context length."""

import argparse
from typing import TYPE_CHECKING

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import ENGINE
from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.runner.cache_layout import CacheLayout

_FLAGS = ENGINE.only("model", "revision", "hf_config_path", "dtype", "page_size", "max_num_batched_tokens")
_LENGTHS = (1024, 4096, 16_384, 32_768, 131_072)
_STEP_TOKENS = 4096
_NEW_TOKENS = 100


def parser() -> Parser:
    parser = Parser(
        "bench pages",
        "Serve one request of each context length by itself on a simulated device, with the real scheduler and page\n"
        "pool, and print the most pages that it held at a time. Layers with a sliding window let go what lies behind\n"
        "it. Only config.json is read of the model.",
        examples=(
            "jaxserve bench pages --model ~/models/gemma-3-4b-it",
            "jaxserve bench pages --model ~/models/gpt-oss-20b --length 65536 131072",
        ),
    )
    parser.add_argument(
        "--length",
        type=positive,
        nargs="+",
        default=_LENGTHS,
        metavar="N",
        help="tokens of prompt and completion; lengths beyond the model's own limit are left out "
        f"(default: {' '.join(map(str, _LENGTHS))})",
    )
    parser.add_argument("--output-json", metavar="FILE", help="write the numbers to this file")
    _FLAGS.add_to(parser, shown_defaults={"max_num_batched_tokens": str(_STEP_TOKENS)})
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console  # on demand, as JAX comes with these

    from jaxserve.cli.bench.report import table_of
    from jaxserve.cli.bench.session import write_report
    from jaxserve.engine.served_model import served_model
    from jaxserve.errors import InputError
    from jaxserve.runner.cache_layout import CacheLayout
    from jaxserve.runner.kv_cache import page_bytes

    config = EngineConfig.from_settings(_FLAGS.given(arguments))
    files, _, model, dtype = served_model(config, with_weights=False)
    lengths = [length for length in arguments.length if length <= model.max_position_embeddings]
    if not lengths:
        raise InputError(
            f"--length is {', '.join(map(str, arguments.length))} and this model has "
            f"{model.max_position_embeddings} positions; give shorter ones"
        )

    def layout(windows: list[int | None], length: int) -> CacheLayout:
        step_tokens = config.max_num_batched_tokens or _STEP_TOKENS
        sizes = {"page_size": config.page_size, "max_step_tokens": step_tokens, "max_model_len": length}
        return CacheLayout.of(windows, **sizes)

    windows = [kind.window for kind in model.layer_kinds]
    table = table_of("tokens of one request", "pages", "MiB", "all kept", "share")
    rows = []
    for length in lengths:
        own, plain = layout(windows, length), layout([None] * len(windows), length)
        held, everything = most_pages(own, length), most_pages(plain, length)
        found, whole = held * page_bytes(model, own, dtype), everything * page_bytes(model, plain, dtype)
        table.add_row(f"{length}", f"{held}", f"{found / 2**20:.1f}", f"{whole / 2**20:.1f}", f"{found / whole:.0%}")
        rows.append({"length": length, "pages": held, "bytes": found, "bytes_without_windows": whole})
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"  {files.name}, {dtype.name}: {_layers(windows)}; pages of {config.page_size} positions. "
        "All kept: MiB if no layer let pages go.",
        soft_wrap=True,
    )
    write_report({"benchmark": "pages", "model": files.name, "rows": rows}, arguments.output_json)


def most_pages(layout: "CacheLayout", length: int) -> int:
    """The most pages that a request of `length` tokens holds at a time, on its way through a scheduler of its own."""
    from jaxserve.engine.simulation import simulated_engine
    from jaxserve.runner.simulated import CostModel
    from jaxserve.sampling_params import SamplingParams

    engine, _ = simulated_engine(
        CostModel(per_pass=0.01),
        layout=layout,
        max_num_seqs=1,
        max_num_batched_tokens=layout.max_step_tokens,
        max_model_len=length,
        max_decode_steps=8,
        page_size=layout.page_size,
        num_pages=layout.pages_of(length),
    )
    prompt = {"prompt_token_ids": [1] * max(1, length - _NEW_TOKENS)}
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    engine.add(engine.inputs.check(prompt, params), params, request_id="0", stream=False)
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.pool.num_held)
    return most


def _layers(windows: list[int | None]) -> str:
    kinds = {window: windows.count(window) for window in dict.fromkeys(windows)}
    return ", ".join(
        f"{count} layers " + (f"with a window of {window}" if window else "that keep everything")
        for window, count in kinds.items()
    )
