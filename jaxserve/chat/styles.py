"""The styles that models think and call tools in, under vLLM's names, and how to tell a model's own."""

import secrets
import string
import uuid
from collections.abc import Callable, Collection
from typing import NamedTuple

from jaxserve.chat import harmony, tool_grammars
from jaxserve.chat.calls import Calls
from jaxserve.chat.source import Parsing, Source
from jaxserve.chat.thinking import MISTRAL_THINK, THINK, Tags
from jaxserve.chat.tool_styles import hermes, llama3_json, mistral

GPT_OSS = "openai_gptoss"  # as reasoning; its channels carry tool calls too, which are then called "openai"
GPT_OSS_TOOLS = "openai"


def make_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _mistral_id() -> str:
    """Nine letters and digits, which is what Mistral's templates take."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class ToolStyle(NamedTuple):
    parse: Callable[[Source, Calls], Parsing[None]]
    grammar: tool_grammars.Style
    markers: tuple[str, ...]
    make_id: Callable[[], str] = make_call_id


REASONING: dict[str, Tags] = {"qwen3": THINK, "deepseek_r1": THINK, "mistral": MISTRAL_THINK}
TOOLS: dict[str, ToolStyle] = {
    "hermes": ToolStyle(hermes, tool_grammars.hermes, ("<tool_call>", "</tool_call>")),
    "llama3_json": ToolStyle(llama3_json, tool_grammars.llama3_json, ("<|python_tag|>",)),
    "mistral": ToolStyle(mistral, tool_grammars.mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), _mistral_id),
}

REASONING_PARSERS = ("auto", "none", *REASONING, GPT_OSS)
TOOL_CALL_PARSERS = ("auto", "none", *TOOLS, GPT_OSS_TOOLS)


def detect_reasoning(template: str, added_tokens: Collection[str]) -> str | None:
    """How a model with this chat template and these added tokens thinks, as far as they tell."""
    if harmony.CHANNEL in template:
        return GPT_OSS
    for name, tags in REASONING.items():
        if tags.close in template or {*tags} <= {*added_tokens}:
            return name
    return None


def detect_tools(template: str, added_tokens: Collection[str]) -> str | None:
    """How it calls tools."""
    if harmony.CHANNEL in template:
        return GPT_OSS_TOOLS
    if "[TOOL_CALLS]" in template or "[TOOL_CALLS]" in added_tokens:
        return "mistral"
    # Other families have these tags too, with XML of their own in them.
    if "<tool_call>" in template and not any(other in template for other in ("<function=", "<arg_key>")):
        return "hermes"
    if "<|python_tag|>" in added_tokens or "<|python_tag|>" in template:
        return "llama3_json"
    return None
