"""One turn of a conversation, whichever API asks for it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxserve.chat.events import Content, Event, Reasoning
from jaxserve.chat.parser import AnswerParser
from jaxserve.chat.tools import Tools
from jaxserve.engine.input_processor import Prompt
from jaxserve.outputs import CompletionOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.core.client import EngineClient
from jaxserve.server.routes.reply import Deltas


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What is asked of the model: the message after these."""

    messages: list[dict[str, Any]]
    sampling: dict[str, Any]  # in SamplingParams' names
    tools: Tools = Tools()
    template: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else it is rendered with
    echoed: str = ""  # what the answer begins with
    include_reasoning: bool = True
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None  # by name
    stream: bool = False  # whether each step's part of the answer is wanted, or all of it at its end

    async def begin(self, engine: EngineClient, request_id: str) -> tuple[Deltas, "Answers"]:
        """Hand the turn to the engine: what comes of it, and the parsers to read that with."""
        params = SamplingParams(**(engine.sampling_defaults | self.sampling))
        token_ids = await self.render(engine)
        settings = engine.chat.settings(params, token_ids, self.tools)
        prompts: dict[str, Prompt] = {request_id: {"prompt_token_ids": token_ids}}
        deltas = engine.generate(
            prompts,
            settings,
            priority=self.priority,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
            stream=self.stream,
        )
        parser = functools.partial(
            engine.chat.parser, token_ids, tools=self.tools, skip_special_tokens=params.skip_special_tokens
        )
        return deltas, Answers(parser, echoed=self.echoed, include_reasoning=self.include_reasoning)

    async def render(self, engine: EngineClient) -> list[int]:
        """The prompt."""
        return await engine.render_chat(self.messages, tools=[*self.tools.shown], **self.template)


class Answers:
    """The answers to one prompt, each read by a parser of its own."""

    def __init__(self, make_parser: Callable[[], AnswerParser], *, echoed: str, include_reasoning: bool):
        self._make_parser, self._echoed, self._include_reasoning = make_parser, echoed, include_reasoning
        self._parsers: dict[int, AnswerParser] = {}

    def read(self, completion: CompletionOutput) -> list[Event]:
        """The events of a completion, or of what a step added to it."""
        events: list[Event] = []
        if completion.index not in self._parsers:
            self._parsers[completion.index] = self._make_parser()
            if self._echoed:
                events.append(Content(self._echoed))
        events += self._parsers[completion.index].read(completion)
        return [event for event in events if self._include_reasoning or not isinstance(event, Reasoning)]

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(parser.num_reasoning_tokens for parser in self._parsers.values())
