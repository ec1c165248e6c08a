"""`jaxserve convert`: HuggingFace directories to Orbax checkpoints, and back."""

import argparse
import sys
import time
from pathlib import Path

from jaxserve.cli.flags import Parser
from jaxserve.cli.options import ENGINE

_FLAGS = ENGINE.only("revision", "hf_config_path", "dtype")


def parser() -> Parser:
    parser = Parser(
        "convert",
        "Make an Orbax checkpoint of a HuggingFace directory (or of a model on its hub), or a HuggingFace directory\n"
        "of an Orbax checkpoint. Either has config and tokenizer inside, and --model takes either.",
        takes="IN OUT",
        examples=(
            "jaxserve convert Qwen/Qwen3-8B qwen3-8b-orbax --revision main",
            "jaxserve convert qwen3-8b-orbax qwen3-8b",
            "jaxserve convert training/checkpoints my-model --hf-config-path my-model-config --dtype bfloat16",
        ),
    )
    parser.add_argument("source", metavar="IN", help="what to convert: a directory, or an id of HuggingFace's hub")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    _FLAGS.add_to(parser, shown_defaults={"dtype": "each tensor's own"})
    return parser


def run(arguments: argparse.Namespace) -> None:
    from jaxserve.checkpoint.convert import convert  # on demand, as JAX comes with it
    from jaxserve.checkpoint.model_files import find_model
    from jaxserve.config import EngineConfig
    from jaxserve.engine.served_model import serving_dtype
    from jaxserve.progress import ProgressBars

    config = EngineConfig.from_settings({"model": arguments.source} | _FLAGS.given(arguments))
    files = find_model(arguments.source, revision=config.revision, hf_config_path=config.hf_config_path)
    start, out = time.perf_counter(), Path(arguments.out).expanduser()
    with ProgressBars(enabled=sys.stderr.isatty()) as bars:
        convert(
            files,
            out,
            dtype=None if config.dtype == "auto" else serving_dtype(config.dtype, {}),
            on_bytes=lambda done, total: bars("weights", done, total),
        )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    kind = "a HuggingFace directory" if files.is_orbax else "an Orbax checkpoint"
    print(f"made {out}: {kind}, {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s", file=sys.stderr)
