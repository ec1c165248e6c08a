"""`jaxserve serve`: OpenAI's API over HTTP."""

import argparse

from jaxserve.cli.flags import Parser
from jaxserve.cli.options import add_engine_flags, engine_config


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
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 takes calls from other machines (default: 127.0.0.1)",
    )
    server.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000)")
    server.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call the model; the name of its directory if left out"
    )
    add_engine_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    config = engine_config(arguments)
    from jaxserve.server.serve import run as serve  # on demand, as the web framework takes a moment

    serve(config, host=arguments.host, port=arguments.port, served_model_name=arguments.served_model_name)
