"""Everything that is checked about a request before the engine takes it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxserve.chat.format import ChatFormat
from jaxserve.config import EngineConfig
from jaxserve.errors import InputError, Name, nearest
from jaxserve.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from jaxserve.structured_outputs import is_unicode

Prompt = str | dict[str, Any]  # text, {"prompt": text} or {"prompt_token_ids": [...]}

_THE_PROMPT = Name("the prompt")


class CheckedInput(NamedTuple):
    """A prompt as tokens, and what its completions are bounded by."""

    prompt: str | None
    prompt_token_ids: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]  # end-of-sequence ids included, unless ignored
    adapter: str | None = None  # by name


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine takes."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: frozenset[int]
    adapters: dict[str, str] = dataclasses.field(default_factory=dict)  # from the start: what each was loaded from


class InputProcessor:
    """Turns prompts into tokens and refuses what cannot be served, with an `InputError` of one sentence.

    `adapters` are those that requests may name now, with what each was loaded from.
    """

    def __init__(self, tokenizer: Any, limits: Limits, chat: ChatFormat | None):
        self.tokenizer, self.limits, self._chat = tokenizer, limits, chat
        self.adapters = dict(limits.adapters)

    def check(self, prompt: Prompt, params: SamplingParams, adapter: str | None = None) -> CheckedInput:
        """`adapter` is the name of one of the engine's, or None."""
        if adapter is not None:
            self.check_adapter(adapter)
        text, token_ids = self._tokens(prompt)
        max_model_len = self.limits.max_model_len
        room = max_model_len - len(token_ids)
        if room < 1:
            raise InputError(
                _THE_PROMPT,
                f" has {len(token_ids)} tokens and max_model_len is {max_model_len}, which must also hold one new "
                "token; shorten it or raise max_model_len",
                field="prompt",
            )
        self._check_params(params)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.limits.eos_token_ids)
        if len(stops) > MAX_STOP_TOKEN_IDS:
            raise InputError(
                Name("stop_token_ids"),
                f" and the model's end-of-sequence ids are {len(stops)} together; at most {MAX_STOP_TOKEN_IDS} are "
                "possible",
            )
        if params.min_tokens and params.allowed_token_ids and stops.issuperset(params.allowed_token_ids):
            raise InputError(
                Name("allowed_token_ids"),
                " holds nothing but tokens that end a completion, and ",
                Name("min_tokens"),
                f"={params.min_tokens} forbids those; allow another one, or leave ",
                Name("min_tokens"),
                " out",
            )
        return CheckedInput(text, token_ids, min(room, params.max_tokens or room), stops, adapter)

    @property
    def chat(self) -> ChatFormat:
        """How the model speaks; `InputError` if there is no tokenizer."""
        if self._chat is None:
            raise _no_tokenizer("chat")
        return self._chat

    def render_chat(
        self, /, messages: Sequence[dict[str, Any]], *, add_special_tokens: bool = False, **template_arguments: Any
    ) -> list[int]:
        """The tokens of a conversation: what `ChatFormat.render` makes of it, encoded.

        Templates write special tokens themselves, so that none are added unless `add_special_tokens` says so.
        """
        text = self.chat.render(messages, **template_arguments)
        self._check_length(text)
        return self._encode(text, add_special_tokens=add_special_tokens)

    def tokenize(self, text: str, *, add_special_tokens: bool = True, must_fit: bool = False) -> list[int]:
        """The tokens of a text, which may be of any length unless it `must_fit` as a prompt."""
        self._need_tokenizer("a prompt of text", "prompt")
        if must_fit:
            self._check_length(text)
        return self._encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, special tokens included."""
        self._need_tokenizer("text of tokens", "tokens")
        for token in token_ids:
            self._check_token(token, "tokens")
        return self.tokenizer.decode(token_ids)

    def check_adapter(self, name: str) -> None:
        """`InputError` if requests may not name it."""
        if name not in self.adapters:
            told = f"there are {', '.join(self.adapters)}" if self.adapters else "there are none"
            raise InputError(Name("adapter"), f" is {name!r}, and {told}; name one of them, or leave it out")

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or len(prompt) != 1:
                hint = nearest(str(next(iter(unknown))), ("prompt", "prompt_token_ids")) if unknown else ""
                raise InputError(
                    f"a prompt has the keys {list(prompt)}; give either 'prompt' or 'prompt_token_ids'{hint}",
                    field="prompt",
                )
            if "prompt_token_ids" in prompt:
                return None, self._checked_ids(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            raise InputError(
                f"a prompt is of type {type(prompt).__name__}; give a string or {{'prompt_token_ids': [...]}}",
                field="prompt",
            )
        return prompt, self._checked_ids(self.tokenize(prompt, must_fit=True))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not is_unicode(text):
            raise InputError(
                _THE_PROMPT,
                " holds half a surrogate pair, which is no character, as comes of bytes that are not UTF-8; leave it "
                "out",
                field="prompt",
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit whatever its tokens are: to find those takes a minute for ten megabytes."""
        max_model_len = self.limits.max_model_len
        if len(text) > (most := max_model_len * self._longest_token):
            raise InputError(
                _THE_PROMPT,
                f" has {len(text)} characters and max_model_len is {max_model_len} tokens, of no more than {most} "
                "characters together; shorten it or raise max_model_len",
                field="prompt",
            )

    @functools.cached_property
    def _longest_token(self) -> int:
        """In characters; of a tokenizer of bytes, each of which is a character of its own there."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _checked_ids(self, token_ids: Any) -> list[int]:
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, str):
            token_ids = token_ids.tolist() if hasattr(token_ids, "tolist") else None
            if not isinstance(token_ids, list):
                raise InputError(Name("prompt_token_ids"), " is no list; give a list of integers")
        if not token_ids:
            raise InputError(_THE_PROMPT, " is empty; give at least one token", field="prompt")
        # Long prompts are checked without a loop of Python's; where something is wrong, the loop finds it.
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= self.limits.vocab_size:
            for token in token_ids:
                self._check_token(token, "prompt_token_ids")
        return list(token_ids)

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.limits.max_logprobs:
                raise InputError(
                    Name(name),
                    f" is {getattr(params, name)}, and this engine was started with "
                    f"max_logprobs={self.limits.max_logprobs}; ask for fewer",
                )
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(params, name) or ():
                self._check_token(token, name)
        if params.stop:
            self._need_tokenizer("a stop string", "stop")
        if params.structured_outputs:
            self._need_tokenizer("a structured output", params.structured_outputs.given_as or "structured_outputs")
        if params.thinking_token_budget is not None and params.thinking is None:
            raise InputError(
                Name("thinking_token_budget"),
                " is given, and only of a chat it is known where its thinking ends; leave it out",
            )

    def _check_token(self, token: Any, field: str) -> None:
        vocab_size = self.limits.vocab_size
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InputError(
                Name(field), f" holds {token!r}; this model's token ids are the integers from 0 to {vocab_size - 1}"
            )

    def _need_tokenizer(self, what: str, field: str) -> None:
        if self.tokenizer is None:
            raise _no_tokenizer(what, field)


def chat_format(tokenizer: Any, config: EngineConfig) -> ChatFormat | None:
    """How the model speaks, as far as there is a tokenizer; `InputError` if that is not what the settings say."""
    if tokenizer is None:
        return None
    return ChatFormat(
        tokenizer,
        chat_template=config.chat_template,
        reasoning_parser=config.reasoning_parser,
        tool_call_parser=config.tool_call_parser,
    )


def _no_tokenizer(what: str, field: str | None = None) -> InputError:
    return InputError(
        f"{what} needs a tokenizer, and this engine was started with skip_tokenizer_init=True; "
        "start it without, or use token ids only",
        field=field,
    )
