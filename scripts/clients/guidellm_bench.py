"""GuideLLM on the command line: short runs over each of OpenAI's ways to generate, none of whose requests fails."""

import json
import sys
import tempfile
from pathlib import Path

import checks
from checks import Server, equal

INPUT, OUTPUT, REQUESTS = 40, 16, 8


def bench(server: Server, request_format: str, profile: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"]
        command += ["--backend", f"kind=openai_http,target={server.address},request_format={request_format}"]
        command += ["--profile", profile, "--constraint", f"kind=max_requests,count={REQUESTS}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={server.model_directory}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={OUTPUT}"]
        command += ["--output", f"kind=json,path={report}"]
        checks.command(command, settings={"HF_HUB_OFFLINE": "1", "HF_HOME": folder}, folder=Path(folder))
        (found,) = json.loads(report.read_text())["benchmarks"]
    requests = found["requests"]
    counts = {outcome: len(requests[outcome]) for outcome in ("successful", "errored", "incomplete")}
    equal("requests", counts, {"successful": REQUESTS, "errored": 0, "incomplete": 0})
    equal("output tokens", {request["output_metrics"]["total_tokens"] for request in requests["successful"]}, {OUTPUT})


def chat(server: Server) -> None:
    bench(server, "/v1/chat/completions", "kind=synchronous")


def completions_side_by_side(server: Server) -> None:
    bench(server, "/v1/completions", "kind=concurrent,streams=4")


def responses(server: Server) -> None:
    bench(server, "/v1/responses", "kind=poisson,rate=8")


if __name__ == "__main__":
    checks.run(chat, completions_side_by_side, responses)
