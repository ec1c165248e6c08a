"""`LLM`: the Python API, in-process and offline."""

import contextlib
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from flax import nnx

from jaxserve.chat.events import as_delta
from jaxserve.chat.parser import AnswerParser, whole_answer
from jaxserve.chat.template import checked_arguments
from jaxserve.chat.tools import Choice, Tools
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.follower import follow
from jaxserve.engine.input_processor import Prompt
from jaxserve.engine.scoring import SCORING, Score, normalised, paired, read_score, scored_tokens
from jaxserve.engine.startup import load
from jaxserve.errors import InputError
from jaxserve.outputs import RequestOutput, add_delta
from jaxserve.progress import ProgressBars
from jaxserve.sampling_params import SamplingParams

Message = dict[str, Any]
Adapter = str | Sequence[str | None] | None  # by name, one for all prompts or one for each


class LLM:
    """A model, ready to generate. A context manager; leaving it frees the device's memory.

        with LLM() as llm:
            print(llm.chat([{"role": "user", "content": "What is 27+45?"}])[0].outputs[0].text)

    `progress` shows bars on a terminal; `settings` are the fields of `EngineConfig`. Not thread-safe: a server has an
    engine in a process of its own (`server/core/`).

    Of several processes (`num_processes`), which may all run the same script, only the first gets past this line: the
    others do its steps with it, and then `SystemExit` ends them.
    """

    def __init__(self, model: str | None = None, *, progress: bool = True, **settings: Any):
        config = EngineConfig.from_settings({"model": model} | settings)
        self._progress = progress
        with ProgressBars(enabled=progress) as bars:
            loaded = load(config, bars)
            if not config.process_id:
                self.engine = Engine(loaded)
        if config.process_id:
            follow(loaded)
            raise SystemExit
        self._ids = itertools.count()
        self._boxes: dict[str, deque[RequestOutput]] = {}  # of each running request, what its caller has not taken yet

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        adapter: Adapter = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The completions of each prompt, in the prompts' order.

        A prompt is a string, `{"prompt": text}` or `{"prompt_token_ids": [...]}`. One `SamplingParams` serves all
        prompts, or give one for each; without any, the model's recommended ones. Requests of lower `priority` values
        run first. `adapter` is the name of one of `lora_modules`, or a list with a name or None for each prompt.
        `use_tqdm=False` shows no bar. `InputError` if any prompt cannot be served, and then none has run.
        """
        ids = self._add(_several(prompts, "prompts"), sampling_params, priority, adapter, stream=False)
        outputs: dict[str, RequestOutput] = {}
        finished = 0
        with ProgressBars(enabled=self._progress and use_tqdm) as bars:
            for delta in self._deltas(ids):
                add_delta(outputs, delta)
                if delta.finished:
                    finished += 1
                    bars("requests", finished, len(ids))
        return [outputs[request_id] for request_id in ids]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[RequestOutput]:
        """What each step adds to one prompt's completions, as it comes. Closing the iterator aborts the request."""
        return self._deltas(self._add([prompt], sampling_params, 0, adapter, stream=True))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: Choice = "auto",
        parallel_tool_calls: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        adapter: Adapter = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation or several, rendered with the model's own chat template.

        Each output has a `message` in OpenAI's shape, with `reasoning_content` and `tool_calls` where there are any,
        which the conversation can go on with; its `text` is all that the model wrote. Structured outputs bind the
        answer behind the thinking. `tool_choice` is in OpenAI's forms. `chat_template_kwargs` are what `render_chat`
        takes, such as `{"enable_thinking": False}`. `adapter` is as in `generate`.
        """
        if not isinstance(messages, Sequence):
            raise InputError(
                f"messages is of type {type(messages).__name__}; give a list of messages, or a list of such lists"
            )
        one = bool(messages) and isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if one else list(messages)
        called = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        prompts = [self._chat_prompt(m, called, chat_template_kwargs) for m in conversations]
        given = self._params(sampling_params, len(prompts))
        settings = [self._for_answer(prompt, each, called) for prompt, each in zip(prompts, given, strict=True)]
        outputs = self.generate(prompts, settings, adapter=adapter, use_tqdm=use_tqdm)
        for output, params in zip(outputs, given, strict=True):
            for completion in output.outputs if params.detokenize else ():
                parser = self._parser(output.prompt_token_ids, params, called)
                completion.message = whole_answer(parser, completion).as_message()
        return outputs

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: Choice = "auto",
        parallel_tool_calls: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
    ) -> Iterator[RequestOutput]:
        """What each step adds to the answers to one conversation. The `message` is a delta in OpenAI's shape."""
        (params,) = self._params(sampling_params, 1)
        called = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        prompt = self._chat_prompt(messages, called, chat_template_kwargs)
        deltas = self.stream(prompt, self._for_answer(prompt, params, called), adapter=adapter)
        return self._read(deltas, params, called)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        adapter: Adapter = None,
        use_tqdm: bool = True,
    ) -> list[list[float]]:
        """An embedding of each prompt, as many numbers as the model's hidden states have.

        The model's last hidden states, of all tokens' mean or of the last token, at a length of one if `normalize`.
        """
        params = SamplingParams(max_tokens=1, pooling=pooling)
        outputs = self.generate(prompts, params, adapter=adapter, use_tqdm=use_tqdm)
        found = [output.embedding or [] for output in outputs]
        return [normalised(embedding) for embedding in found] if normalize else found

    def score(
        self,
        prompts: str | Sequence[str],
        continuations: str | Sequence[str],
        *,
        adapter: str | None = None,
        use_tqdm: bool = True,
    ) -> list[Score]:
        """How likely each continuation is after its prompt; one prompt may have several continuations."""
        texts = paired(_several(prompts, "prompts"), _several(continuations, "continuations"))
        pairs = [scored_tokens(self.engine.inputs.tokenize, *pair) for pair in texts]
        scored: list[Prompt] = [{"prompt_token_ids": tokens} for tokens, _ in pairs]
        outputs = self.generate(scored, SCORING, adapter=adapter, use_tqdm=use_tqdm)
        return [read_score(output, count) for output, (_, count) in zip(outputs, pairs, strict=True)]

    def render_chat(
        self, messages: Sequence[Message], *, tools: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The prompt that `chat` makes of a conversation.

        `kwargs` are variables of the template, or `documents`, `add_generation_prompt`, `continue_final_message`,
        `reasoning_effort` and `add_special_tokens`, as the server knows them.
        """
        return {"prompt_token_ids": self.engine.inputs.render_chat(messages, tools=tools, **kwargs)}

    @property
    def state(self) -> nnx.State:
        """The model's parameters, as they lie on the devices: the very arrays, not copies."""
        self._check_open()
        return self.engine.runner.weights

    def update_weights(self, state: nnx.State) -> None:
        """Go on with the parameters `state`: a trainer's `nnx.state(model)`, with the structure of `self.state`.

        Requests under way end on the old weights first, which this call waits for; none ever sees both. Nothing is
        compiled again. Arrays of the served dtype that lie as those of `self.state` lie are shared, not copied, so
        they must not be donated to another program; others are cast or moved. The prefix cache is emptied. `InputError`
        if `state` does not belong to this model.
        """
        self._check_open()
        start = time.perf_counter()
        self.engine.update_weights(state)
        while self.engine.waits_for_new_weights:
            for delta in self.engine.step():
                self._boxes[delta.request_id].append(delta)
        if self._progress:
            print(f"weights updated in {time.perf_counter() - start:.3f} s", file=sys.stderr)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Let requests name one more LoRA adapter, of that directory or hub id. It takes a place of `max_loras`.

        `InputError` if it is none of this model, or its name or all places are taken.
        """
        self._check_open()
        self.engine.adapters.put(self.engine.adapters.read(name, os.fspath(path)), os.fspath(path))

    def unload_adapter(self, name: str) -> None:
        """Let no more requests name an adapter. Its place is free once those that did have ended."""
        self._check_open()
        self.engine.adapters.remove(name)

    def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer, or None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's `generation_config.json` recommends."""
        return SamplingParams(**self.engine.sampling_defaults)

    def close(self) -> None:
        """Free the device's memory; the engine is of no use afterwards."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.engine.is_closed:
            raise InputError("the engine is closed, and its weights and pages are gone; make a new one")

    def _chat_prompt(
        self, messages: Sequence[Message], tools: Tools, arguments: dict[str, Any] | None
    ) -> dict[str, Any]:
        return self.render_chat(messages, tools=[*tools.shown], **(checked_arguments(arguments) or {}))

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        """Those of each of so many prompts."""
        params = _one_each(self.get_default_sampling_params() if given is None else given, count, "sampling_params")
        for each in params:
            if not isinstance(each, SamplingParams):
                raise InputError(
                    f"sampling_params is {each!r}; give SamplingParams(...), or a list with one for each prompt"
                )
        return params

    def _for_answer(self, prompt: dict[str, Any], params: SamplingParams, tools: Tools) -> SamplingParams:
        return self.engine.inputs.chat.settings(params, prompt["prompt_token_ids"], tools)

    def _parser(self, prompt_token_ids: list[int], params: SamplingParams, tools: Tools) -> AnswerParser:
        return self.engine.inputs.chat.parser(
            prompt_token_ids, tools=tools, skip_special_tokens=params.skip_special_tokens
        )

    def _read(self, deltas: Iterator[RequestOutput], params: SamplingParams, tools: Tools) -> Iterator[RequestOutput]:
        parsers: dict[int, AnswerParser] = {}
        with contextlib.closing(deltas):  # type: ignore[type-var]
            for delta in deltas:
                for output in delta.outputs if params.detokenize else ():
                    if output.index not in parsers:
                        parsers[output.index] = self._parser(delta.prompt_token_ids, params, tools)
                    output.message = as_delta(parsers[output.index].read(output))
                yield delta

    def _add(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        adapter: Adapter,
        *,
        stream: bool,
    ) -> list[str]:
        """Queue all prompts, or none if one of them cannot be served."""
        self._check_open()
        params = self._params(sampling_params, len(prompts))
        priorities = _one_each(priority, len(prompts), "priority")
        for each in priorities:
            if not isinstance(each, int):  # one that does not compare would fail in the middle of a step
                raise InputError(f"priority is {each!r}; give an integer, or a list with one for each prompt")
        adapters = _one_each([adapter] * len(prompts) if isinstance(adapter, str) else adapter, len(prompts), "adapter")
        given = zip(prompts, params, adapters, strict=True)
        checked = [self.engine.inputs.check(prompt, each, own) for prompt, each, own in given]
        grammars = [self.engine.grammars.compiled(each) for each in params]
        ids = [str(next(self._ids)) for _ in prompts]
        for request_id, prompt, each, first, grammar in zip(ids, checked, params, priorities, grammars, strict=True):
            self.engine.add(prompt, each, request_id=request_id, priority=first, stream=stream, grammar=grammar)
        self._boxes |= {request_id: deque() for request_id in ids}
        return ids

    def _deltas(self, ids: list[str]) -> Iterator[RequestOutput]:
        """Step until these requests have ended. What other callers' requests get on the way waits in their boxes."""
        boxes = [self._boxes[request_id] for request_id in ids]
        unfinished = len(ids)
        try:
            while unfinished:
                self._check_open()  # else what was dropped would be waited for
                for delta in self.engine.step():
                    self._boxes[delta.request_id].append(delta)
                for box in boxes:
                    while box:
                        delta = box.popleft()
                        unfinished -= delta.finished
                        yield delta
        finally:
            self._drop(ids)

    def _drop(self, ids: list[str]) -> None:
        for request_id in ids:
            self.engine.abort(request_id)
            self._boxes.pop(request_id, None)


def _several(given: Any, name: str) -> list[Any]:
    """What may be one or many, as a list."""
    if isinstance(given, str | dict):
        return [given]
    if not isinstance(given, Iterable):
        raise InputError(f"{name} is of type {type(given).__name__}; give one, or a list of them")
    return list(given)


def _one_each(given: Any, count: int, name: str) -> list[Any]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InputError(f"{name} has {len(given)} entries for {count} prompts; give one for each, or one for all")
    return list(given)
