"""`jaxserve serve`: OpenAI's API over HTTP."""

import argparse

from jaxserve.cli.flags import Flags, Parser
from jaxserve.cli.options import ENGINE, add_engine_flags, follow, read_settings
from jaxserve.server.config import ServerConfig

SERVER = Flags("server", ServerConfig)


def parser() -> Parser:
    parser = Parser(
        "serve",
        "Answer OpenAI's API over HTTP, until Ctrl-C.",
        examples=(
            "jaxserve serve",
            "jaxserve serve --model ~/models/Qwen3-8B --max-model-len 16384 --port 8001",
            "jaxserve serve --config llama-3.3-70b-8gpu --model ~/models/Llama-3.3-70B-Instruct",
        ),
    )
    SERVER.add_to(parser)
    add_engine_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    config, server = read_settings(arguments, ENGINE, SERVER)
    if config.process_id:
        follow(config)
        return
    from jaxserve.server.serve import run as serve  # on demand, as the web framework takes a moment

    serve(config, server)
