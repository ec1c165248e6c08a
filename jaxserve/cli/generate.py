"""`jaxserve generate`: completions of prompts, in one batch."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.text import Text

from jaxserve.cli.flags import Parser
from jaxserve.cli.options import (
    SAMPLING,
    TEXT_ENGINE,
    add_adapter_flag,
    add_engine_flags,
    check_adapter,
    engine_config,
    start_llm,
)
from jaxserve.cli.terminal import printable
from jaxserve.errors import InputError
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

MAX_TOKENS = 256  # of a plain completion, which may have no end of its own; a chat's answer has one


def parser() -> Parser:
    parser = Parser(
        "generate",
        "Complete prompts, all in one batch, and print each with its completion.",
        takes="[PROMPT...]",
        examples=(
            'jaxserve generate --chat "What is 27+45?" "What is the capital of France?"',
            'jaxserve generate "Once upon a time" --temperature 0.8 --top-p 0.95 --n 3 --max-tokens 60',
            "jaxserve generate --model ~/models/Qwen3-8B --chat --prompts-file questions.txt --json > answers.jsonl",
        ),
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to complete")
    parser.add_argument("--prompts-file", metavar="FILE", help="a file with one prompt a line; - reads standard input")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one line of JSON per prompt: text, token ids, log-probabilities, times",
    )
    add_adapter_flag(parser)
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message, rendered with the model's chat template"
    )
    chat.add_argument("--system-prompt", metavar="TEXT", help="goes before each message; implies --chat")
    chat.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether a model that can think does so before its answer; implies --chat",
    )
    SAMPLING.add_to(parser, shown_defaults={"max_tokens": f"{MAX_TOKENS}; with --chat, the model's length"})
    add_engine_flags(parser, TEXT_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    texts = [*arguments.prompts, *_read_prompts(arguments.prompts_file)]
    if not texts:
        raise InputError("there is no prompt; give one or more, or --prompts-file")
    config = engine_config(arguments, TEXT_ENGINE)
    check_adapter(arguments.adapter, config)
    with start_llm(config) as llm:
        chat = arguments.chat or arguments.system_prompt is not None or arguments.thinking is not None
        settings = {"max_tokens": None if chat else MAX_TOKENS} | SAMPLING.given(arguments)
        params = dataclasses.replace(llm.get_default_sampling_params(), **settings)
        start = time.perf_counter()
        if chat:
            outputs = _chat(llm, texts, params, arguments)
        else:
            outputs = llm.generate(texts, params, adapter=arguments.adapter)
        seconds = time.perf_counter() - start
        console = Console(highlight=False)
        for text, output in zip(texts, outputs, strict=True):
            if arguments.json:
                print(json.dumps(_record(text, output)))
            else:
                _print_output(console, text, output)
    tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    prompts_done = f"{len(texts)} prompt{'s' * (len(texts) > 1)}"
    print(f"{prompts_done}, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def _read_prompts(file: str | None) -> list[str]:
    """The lines of `file` that are not blank."""
    if file is None:
        return []
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts of {file} ({error})") from error
    return [line for line in text.splitlines() if line.strip()]


def _chat(llm: "LLM", texts: list[str], params: SamplingParams, arguments: argparse.Namespace) -> list[RequestOutput]:
    system = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt is not None else []
    options = {} if arguments.thinking is None else {"enable_thinking": arguments.thinking}
    conversations = [[*system, {"role": "user", "content": text}] for text in texts]
    return llm.chat(conversations, params, chat_template_kwargs=options, adapter=arguments.adapter)


def _record(text: str, output: RequestOutput) -> dict[str, Any]:
    record = msgspec.to_builtins(output)
    metrics = output.metrics
    del record["request_id"], record["finished"], record["metrics"]
    return record | {
        "prompt": text,
        "ttft_seconds": (metrics.first_token_time or metrics.arrival_time) - metrics.arrival_time,
        "total_seconds": (metrics.finished_time or metrics.arrival_time) - metrics.arrival_time,
    }


def _print_output(console: Console, text: str, output: RequestOutput) -> None:
    console.print(Text(f"> {text}", style="bold"), soft_wrap=True)
    for completion in output.outputs:
        label = f"[{completion.index + 1}] " if len(output.outputs) > 1 else ""
        console.print(Text(label, style="bold"), _readable(completion), sep="", soft_wrap=True)
    console.print()


def _readable(completion: CompletionOutput) -> Text:
    """The answer with its reasoning dimmed, and a word on an end that the model did not choose."""
    message = completion.message or {"content": completion.text}
    reasoning, content = message.get("reasoning_content", ""), message["content"] or ""
    shown = Text()
    shown.append(printable(reasoning.rstrip("\n")), style="dim")
    if reasoning and content:
        shown.append("\n\n")
    shown.append(printable(content))
    if completion.finish_reason == "length":
        shown.append(f" ... (cut after {len(completion.token_ids)} tokens)", style="dim")
    return shown
