"""`jaxserve plan`: on which GPUs a model fits, how many requests beside it, and how soon a token can come at best."""

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import ENGINE
from jaxserve.config import EngineConfig
from jaxserve.errors import InputError, nearest

if TYPE_CHECKING:
    import jax.numpy as jnp

    from jaxserve.models.config import ModelConfig

_FLAGS = ENGINE.only(
    *("model", "revision", "hf_config_path", "dtype", "quantization", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "page_size", "gpu_memory_utilization"),
)
_LENGTH = 8192
_DEVICES = (1, 2, 4, 8)
_GIB = 2**30


class Gpu(NamedTuple):
    mib: int  # of memory, as nvidia-smi tells it
    gb_per_second: int  # that it is read at, by NVIDIA's data sheets


GPUS = {
    "L4": Gpu(23_034, 300),
    "A10G": Gpu(23_028, 600),
    "RTX4090": Gpu(24_564, 1008),
    "L40S": Gpu(46_068, 864),
    "A100-40": Gpu(40_960, 1555),
    "A100-80": Gpu(81_920, 2039),
    "H100": Gpu(81_559, 3350),
    "H200": Gpu(143_771, 4800),
    "B200": Gpu(183_359, 8000),
}


class Fit(NamedTuple):
    """A model on some GPUs; bytes are of each of them."""

    weight_bytes: int
    page_bytes: int
    longest: int  # tokens that a single request may have
    requests: int  # at a time
    seconds: float  # that a step takes at least: its weights are read once


def parser() -> Parser:
    parser = Parser(
        "plan",
        "Say on which GPUs a model fits, and how many requests at a time. No weights are read and no GPU is needed:\n"
        "it is the arithmetic by which the engine divides memory when it starts. How soon a token can come at best\n"
        "follows from the bytes that a step reads and what the memory is said to give; nothing is measured.",
        examples=(
            "jaxserve plan --model ~/models/Qwen3-8B",
            "jaxserve plan --model ~/models/Llama-3.3-70B-Instruct --quantization int8 --gpu H100 H200 --length 32768",
        ),
    )
    parser.add_argument(
        "--gpu",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(GPUS)}: each number of them that it fits on; the smallest of each kind if left out",
    )
    parser.add_argument(
        "--length",
        type=positive,
        default=_LENGTH,
        metavar="N",
        help=f"tokens of prompt and completion that a request has (default: {_LENGTH}, or the model's limit)",
    )
    parser.add_argument("--output-json", metavar="FILE", help="write the numbers to this file")
    _FLAGS.add_to(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console  # on demand, as JAX comes with these

    from jaxserve.cli.bench.report import table_of
    from jaxserve.cli.bench.session import write_report
    from jaxserve.engine.served_model import served_model

    for name in arguments.gpu or ():
        if name not in GPUS:
            raise InputError(
                f"there is no GPU {name!r} in the list{nearest(name, GPUS) or f'; give {", ".join(GPUS)}'}"
            )
    config = EngineConfig.from_settings(_FLAGS.given(arguments))
    files, _, model, dtype = served_model(config, with_weights=False)
    length = min(arguments.length, config.max_model_len or model.max_position_embeddings)
    table = table_of("GPUs", "weights", "pages", "longest", "requests", "ms", first_width=12)
    rows: list[dict[str, Any]] = []
    for name in arguments.gpu or GPUS:
        found = {n: fit for n in _DEVICES if (fit := fit_on(GPUS[name], n, model, dtype, config, length)) is not None}
        if not arguments.gpu:
            found = dict(list(found.items())[:1])
        for number, fit in found.items():
            rows.append({"gpu": name, "devices": number} | fit._asdict())
            table.add_row(
                f"{number} x {name}",
                f"{fit.weight_bytes / _GIB:.1f}",
                f"{fit.page_bytes / _GIB:.1f}",
                f"{fit.longest:,}",
                f"{fit.requests:,}",
                f"{1000 * fit.seconds:.1f}",
            )
        if not found:
            rows.append({"gpu": name, "devices": None})
            table.add_row(name, *["-"] * 5)
    console = Console(highlight=False)
    console.print(table)
    numbers = dtype.name if model.quantization is None else f"{dtype.name}, linear layers in {model.quantization}"
    console.print(
        f"  {files.name}, {numbers}.\n"
        "  weights, pages: GiB of each GPU; pages get what "
        f"{config.gpu_memory_utilization:.0%} of its memory leaves beside weights and a step's work\n"
        "  longest: tokens that a single request may have\n"
        f"  requests: of {length:,} tokens, at a time\n"
        "  ms: the weights read once, which each token of a single request takes at least\n"
        "  -: does not fit on eight",
        soft_wrap=True,
    )
    write_report({"plan": files.name, "length": length, "rows": rows}, arguments.output_json)


def fit_on(
    gpu: Gpu, devices: int, model: "ModelConfig", dtype: "jnp.dtype", config: EngineConfig, length: int
) -> Fit | None:
    """The model on that many of one kind; None if it does not split so, or leaves no room for a request of `length`."""
    from jaxserve.checkpoint.huggingface import abstract_model
    from jaxserve.engine.sizes import ON_GPU, sizes_of
    from jaxserve.runner.memory import array_bytes, pages_within, step_weight_bytes

    if not model.splits_over(devices):
        return None
    placed = model.over_tensor_axis(devices)
    sizes = sizes_of(config, placed, dtype, ON_GPU)
    weights = abstract_model(placed, dtype)[1]
    pages = pages_within(
        int(gpu.mib * 2**20 * config.gpu_memory_utilization) * devices,
        page_bytes=sizes.page_bytes,
        wanted=sizes.wanted_pages,
        weight_bytes=array_bytes(weights),
        working_bytes=sizes.working_bytes,
    )
    requests = min(pages // sizes.layout.pages_of(length), sizes.max_num_seqs)
    if requests < 1:
        return None
    return Fit(
        array_bytes(weights) // devices,
        pages * sizes.page_bytes // devices,
        sizes.layout.longest_within(pages, sizes.max_model_len),
        requests,
        step_weight_bytes(placed, weights) / devices / (gpu.gb_per_second * 1e9),
    )
