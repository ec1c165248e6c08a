"""`vllm bench serve`, of vLLM's build for CPUs: its requests all succeed and get the tokens that it asks for."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import checks
from checks import MODEL, Server, equal, holds

os.environ["HF_HUB_OFFLINE"] = "1"
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

INPUT, OUTPUT, REQUESTS = 40, 24, 16


def bench(server: Server, *words: str) -> dict[str, Any]:
    """What `vllm bench serve` finds. It is called in Python, as the build for CPUs lacks the command's version."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        given = ["--base-url", server.address, "--tokenizer", str(server.model_directory)]
        given += ["--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)]
        given += ["--num-prompts", str(REQUESTS), "--ignore-eos", "--save-result", "--result-dir", folder]
        main(parser.parse_args([*given, "--result-filename", "result.json", *words]))
        result = json.loads((Path(folder) / "result.json").read_text())
    equal("completed and failed", (result["completed"], result["failed"]), (REQUESTS, 0))
    equal("output tokens", result["total_output_tokens"], REQUESTS * OUTPUT)
    holds("times are told", result["mean_ttft_ms"] > 0 and result["mean_tpot_ms"] > 0)
    return result


def completions(server: Server) -> None:
    result = bench(server, "--backend", "openai", "--endpoint", "/v1/completions")
    equal("the model, as the server names it", result["model_id"], str(server.model_directory))


def chat(server: Server) -> None:
    bench(server, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--model", MODEL)


def completions_at_a_rate(server: Server) -> None:
    words = ["--request-rate", "8", "--max-concurrency", "3", "--ready-check-timeout-sec", "30", "--temperature", "0.5"]
    bench(server, "--backend", "vllm", "--endpoint", "/v1/completions", "--model", MODEL, *words)


if __name__ == "__main__":
    checks.run(completions, chat, completions_at_a_rate)
