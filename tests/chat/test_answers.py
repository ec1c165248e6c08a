"""What the engine is told of an answer, and what the parser reads: whatever is let through is what was asked for.

Random answers are drawn token by token from what a constraint allows, over a tokenizer of bytes, and then read.
"""

import dataclasses
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxserve.chat.events import Answer
from jaxserve.chat.format import ChatFormat
from jaxserve.chat.tools import Tools
from jaxserve.engine.constraint import Constraint
from jaxserve.engine.grammars import Grammars
from jaxserve.errors import InputError
from jaxserve.runner.step_batch import mask_words
from jaxserve.sampling_params import SamplingParams, Thinking
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.chat.test_format import CHANNELS, HARMONY, PLAIN, USER, made_tokenizer

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "how": {"$ref": "#/$defs/how"}},
    "required": ["a", "how"],
    "additionalProperties": False,
    "$defs": {"how": {"enum": ["fast", 'slow " one']}},
}
TREE = {
    "type": "object",
    "properties": {"leaf": {"type": "boolean"}, "under": {"$ref": "#"}},
    "required": ["leaf"],
    "additionalProperties": False,
}
SCHEMAS = {"add": ADD, "grow.tree-2": TREE, "stop": {"type": "object", "additionalProperties": False}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}},
    {"type": "function", "function": {"name": "grow.tree-2", "parameters": TREE}},
    {"type": "function", "function": {"name": "stop"}},
]
WANTED: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
WANTED["additionalProperties"] = False

SHOWS = PLAIN + "{{ tools }}"
THINK = ("<think>", "</think>")
# Template, special tokens, added tokens, and the styles if they are not told.
MODELS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    "hermes": (SHOWS + "{# <tool_call> #}", (), (*THINK, "<tool_call>", "</tool_call>"), {}),
    "hermes in text": (SHOWS + "{# <tool_call> #}", (), THINK, {}),
    "thinking opened": (SHOWS + "<think>\n{# <tool_call> #}", (), (*THINK, "<tool_call>", "</tool_call>"), {}),
    "llama": (SHOWS, ("<|python_tag|>",), (), {}),
    "mistral list": (SHOWS, ("[TOOL_CALLS]", "[THINK]", "[/THINK]"), (), {}),
    "mistral names": (SHOWS + "{# [ARGS] #}", ("[TOOL_CALLS]", "[ARGS]"), (), {}),
    "mistral ids": (SHOWS + "{# [ARGS][CALL_ID] #}", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), (), {}),
    "mistral in text": (SHOWS, (), THINK, {"tool_call_parser": "mistral"}),
    "channels": (CHANNELS, HARMONY, (), {}),
}
ENDS = ("</s>", "<|return|>", "<|call|>")
LIKELY = [*'"}],:\n ', *ENDS, "<think>", "</think>", "[/THINK]", "<|end|>", "<tool_call>", "[TOOL_CALLS]", "{"]


class Model:
    """A tokenizer of bytes, and the format and the grammars of one who speaks so."""

    def __init__(self, name: str):
        self.name = name
        template, special, added, styles = MODELS[name]
        self.tokenizer = made_tokenizer(template, (*special, "</s>"), added)
        self.format = ChatFormat(self.tokenizer, **styles)
        known = self.tokenizer.get_vocab()
        self.ends = {known[token] for token in ENDS if token in known}
        self.likely = {known[token] for token in LIKELY if token in known} | {
            self.tokenizer.encode(text)[0] for text in LIKELY if len(text) == 1
        }
        self.readable = [self.tokenizer.encode(chr(code))[0] for code in range(32, 127)]
        self.grammars = Grammars(self.tokenizer, vocab_size=len(self.tokenizer), eos_token_ids=sorted(self.ends))
        self.prompt = self.tokenizer.encode(self.format.render([USER], tools=TOOLS), add_special_tokens=False)

    def settings(self, tools: Tools, **params: Any) -> SamplingParams:
        return self.format.settings(SamplingParams(**params), self.prompt, tools)

    def draw(self, settings: SamplingParams, seed: int, most: int = 1500) -> tuple[list[int], bool]:
        """Tokens of a random answer that keeps to `settings`, and whether it came to an end."""
        chance = random.Random(seed)
        constraint = Constraint(self.grammars.compiled(settings), settings.thinking)
        tokens: list[int] = []
        while len(tokens) < most and not constraint.complete:
            token = self._next(constraint, chance)
            if token in self.ends:
                return tokens, True
            tokens.append(token)
            constraint.accept(token)
            assert constraint.error is None
        return tokens, constraint.complete

    def _next(self, constraint: Constraint, chance: random.Random) -> int:
        mask = np.zeros(mask_words(len(self.tokenizer)), np.uint32)
        allowed = None
        if constraint.allow(mask):
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        pool = self.likely if chance.random() < 0.5 else set(self.readable)
        if allowed is None:  # it thinks, and is not to end there
            return chance.choice(sorted(pool - self.ends))
        return chance.choice(sorted(pool.intersection(allowed)) or allowed)

    def read(self, tokens: list[int], tools: Tools) -> Answer:
        parser = self.format.parser(self.prompt, tools=tools)
        answer = Answer()
        text = self.tokenizer.decode(tokens, skip_special_tokens=not self.format.needs_special_tokens(tools=True))
        for event in [*parser.push(text), *parser.finish()]:
            answer.add(event)
        return answer


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


def check_calls(answer: Answer, names: set[str]) -> None:
    for call in answer.tool_calls:
        assert call.name in names
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_calls_and_nothing_else(model: Model, parallel: bool) -> None:
    tools = Tools.of(TOOLS, "required", parallel=parallel)
    settings, counts = model.settings(tools), set()
    for seed in range(12):
        tokens, ended = model.draw(settings, seed)
        if ended:
            answer = model.read(tokens, tools)
            check_calls(answer, {*SCHEMAS})
            assert not answer.content
            counts.add(len(answer.tool_calls))
    assert 0 not in counts
    assert counts
    one_at_most = not parallel or model.format.tool_call_parser == "openai"  # a call ends the turn there
    assert (max(counts) == 1) is one_at_most


def test_a_named_tool_is_called_once(model: Model) -> None:
    tools = Tools.of(TOOLS, {"type": "function", "function": {"name": "add"}})
    settings = model.settings(tools)
    ended = 0
    for seed in range(8):
        tokens, has_ended = model.draw(settings, seed)
        if has_ended:
            answer = model.read(tokens, tools)
            check_calls(answer, {"add"})
            assert (len(answer.tool_calls), answer.content) == (1, "")
            ended += 1
    assert ended


def test_tools_that_are_allowed_or_strict_are_called_so_or_not_at_all(model: Model) -> None:
    tools = Tools.of(TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOLS[0], TOOLS[2]]}})
    settings = model.settings(tools)
    counts = set()
    for seed in range(20):
        tokens, ended = model.draw(settings, seed, most=600)
        if ended:
            answer = model.read(tokens, tools)
            check_calls(answer, {"add", "stop"})
            counts.add(bool(answer.tool_calls))
    assert False in counts  # words are free
    # A mark that is no token of its own is hardly spelled by chance.
    assert (True in counts) or model.name.endswith("in text")


def test_a_form_beside_tools_is_of_what_is_no_call(model: Model) -> None:
    tools = Tools.of(TOOLS)
    settings = model.settings(tools, structured_outputs=StructuredOutputsParams(json=WANTED))
    counts = set()
    for seed in range(16):
        tokens, ended = model.draw(settings, seed)
        if ended:
            answer = model.read(tokens, tools)
            check_calls(answer, {*SCHEMAS})
            counts.add(bool(answer.tool_calls))
            if answer.tool_calls:
                assert not answer.content
            else:
                jsonschema.validate(json.loads(answer.content), WANTED)
    assert False in counts


@pytest.mark.parametrize("budget", [None, 0, 4])
def test_a_form_binds_behind_thinking_that_keeps_to_its_budget(model: Model, budget: int | None) -> None:
    if budget is not None and model.format.reasoning_parser == "none":
        with pytest.raises(InputError, match="thinking_token_budget is given, and it is not known how"):
            model.settings(Tools(), thinking_token_budget=budget)
        return
    wanted = StructuredOutputsParams(json=WANTED)
    settings = model.settings(Tools(), structured_outputs=wanted, thinking_token_budget=budget)
    ended = 0
    for seed in range(8):
        tokens, has_ended = model.draw(settings, seed)
        if has_ended:
            answer = model.read(tokens, Tools())
            jsonschema.validate(json.loads(answer.content), WANTED)
            assert budget is None or len(model.tokenizer.encode(answer.reasoning)) <= budget
            ended += 1
    assert ended


def test_how_an_answer_thinks_is_told_from_its_prompt() -> None:
    model = Model("hermes")
    known = model.tokenizer.get_vocab()
    bound = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]), thinking_token_budget=7)

    def thinking(prompt: str) -> Thinking | None:
        return model.format.settings(bound, model.tokenizer.encode(prompt), Tools()).thinking

    line, close = model.tokenizer.encode("\n")[0], known["</think>"]
    may_think = Thinking(start=(known["<think>"],), end=(close,), budget=7, closing=(line, close), blank=(line,))
    assert thinking("<|user|>What is </think>?<|assistant|>") == may_think
    assert thinking("<|user|>x<|assistant|><think>\n") == dataclasses.replace(may_think, start=())
    assert thinking("<|user|>x<|assistant|><think>\n\n</think>\n\n") is None
    free = SamplingParams()
    assert model.format.settings(free, model.tokenizer.encode("<|assistant|>"), Tools()).constrained is False


def test_forms_need_a_mark_where_thinking_ends() -> None:
    tokenizer = made_tokenizer(PLAIN)
    format = ChatFormat(tokenizer, reasoning_parser="qwen3")
    with pytest.raises(InputError, match="has no token for '</think>'"):
        format.settings(SamplingParams(thinking_token_budget=5), tokenizer.encode("<|assistant|>"))


def test_calls_need_a_style() -> None:
    format = ChatFormat(made_tokenizer(SHOWS), tool_call_parser="none")
    for tools, field in ((Tools.of(TOOLS), "tools"), (Tools.of(TOOLS, "required"), "tool_choice")):
        with pytest.raises(InputError, match=f"{field} asks for calls.*tool_call_parser='none'") as caught:
            format.settings(SamplingParams(), [1], tools)
        assert caught.value.field == field
