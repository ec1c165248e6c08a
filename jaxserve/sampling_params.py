"""How the tokens of one request are chosen, with the names that vLLM's users know."""

import dataclasses
import math
from typing import Any

from jaxserve.errors import InputError, Name, nearest
from jaxserve.structured_outputs import StructuredOutputsParams

# Every token of a sequence is compared with all of its stop strings.
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 256  # per request, and characters of each
MAX_STOP_TOKEN_IDS = 16  # per request, end-of-sequence ids included: the device keeps that many for `min_tokens`
POOLINGS = ("mean", "last")  # of a prompt's last hidden states: all tokens' mean, or the last token's


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a completion's thinking ends, so that `structured_outputs` bind only behind it, and how long it may be.

    Attributes:
        end: the token ids that end it.
        start: the token ids that open it, if the model itself does, as the first ones or not at all; empty if the
            prompt has opened it.
        budget: the most tokens between these two, or None.
        closing: the token ids that end it when the budget is spent.
        blank: token ids of which a few may stand between it and what is bound; who reads the text drops them.
        in_grammar: whether the grammar is of the thinking too, and binds from the first token on.
    """

    end: tuple[int, ...]
    start: tuple[int, ...] = ()
    budget: int | None = None
    closing: tuple[int, ...] = ()
    blank: tuple[int, ...] = ()
    in_grammar: bool = False


@dataclasses.dataclass(frozen=True)
class ChatGrammar:
    """What an answer may be made of where that is not left to the model: calls of tools, and content.

    Attributes:
        rules: a grammar in Lark's syntax, in which `content` is what `structured_outputs` say, or any text.
    """

    rules: str


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request. Every value is checked here; `InputError` names the field and what is allowed.

    Attributes:
        n: completions of the prompt.
        temperature: 0 takes the likeliest token; higher values flatten the distribution.
        top_p: keep the likeliest tokens whose probabilities add up to this, in (0, 1].
        top_k: keep this many likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as probable as the likeliest, in [0, 1].
        repetition_penalty: above 1 discourages tokens of prompt and output (Keskar et al., 2019, arXiv:1909.05858).
        presence_penalty: subtracted from the logits of tokens already in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        allowed_token_ids: sample from these tokens alone; all are allowed if left out.
        seed: makes the request repeatable, whatever runs beside it; completion i of n uses seed + i.
        max_tokens: the most tokens of a completion; with no such limit it goes on to the model's length.
        min_tokens: no end-of-sequence and no stop token before this many.
        stop: a string, or several, that end a completion and are not part of it; at most 64 of 256 characters each.
        stop_token_ids: token ids that end a completion.
        ignore_eos: go on after end-of-sequence.
        include_stop_str_in_output: keep the stop string in the text.
        logprobs: log-probabilities of the sampled token and this many likeliest ones at each step.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: make text of the tokens.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: what the text has to be: JSON of a schema, a match of a regular expression, and the like.
        thinking_token_budget: the most tokens of a chat's thinking; then it is ended, and the answer follows.
        thinking: where it ends in the answer to a prompt, and how; `LLM.chat` and the server set it.
        chat_grammar: what the answer has to be beside that, because of tools; `LLM.chat` and the server set it.
        pooling: "mean" or "last" gives an embedding of the prompt in place of a completion; `LLM.embed` sets it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None
    thinking: Thinking | None = None
    chat_grammar: ChatGrammar | None = None
    pooling: str | None = None

    def __init__(self, **settings: Any):
        fields = {field.name: field.default for field in dataclasses.fields(type(self))}
        for name in settings:
            if name not in fields:
                raise InputError(f"SamplingParams has no field {name!r}{nearest(name, fields)}", field=name)
        for name, default in fields.items():
            object.__setattr__(self, name, settings.get(name, default))
        self._normalise()
        self._check()

    @property
    def grammar(self) -> tuple[StructuredOutputsParams | None, ChatGrammar | None] | None:
        """What the text has to follow, if it has to follow anything."""
        made_of = (self.structured_outputs, self.chat_grammar)
        return made_of if any(made_of) else None

    @property
    def constrained(self) -> bool:
        """Whether the next token may depend on those before it."""
        return self.grammar is not None or self.thinking is not None

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        if isinstance(self.structured_outputs, dict):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**self.structured_outputs))

    def _check(self) -> None:
        self._integer("n", 1, 1024)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, above=True)
        self._integer("top_k", 0, 2**31 - 1, meaning="0 or -1 to keep all tokens, or more")
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, 100.0, above=True)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._integer("min_tokens", 0, 2**31 - 1)
        for name, low, high in (
            ("seed", -(2**63), 2**64 - 1),
            ("max_tokens", 1, 2**31 - 1),
            ("logprobs", 0, 2**31 - 1),
            ("thinking_token_budget", 0, 2**31 - 1),
        ):
            if getattr(self, name) is not None:
                self._integer(name, low, high)
        if self.prompt_logprobs is not None:
            self._integer("prompt_logprobs", 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(
                Name("min_tokens"),
                f"={self.min_tokens} is more than ",
                Name("max_tokens"),
                f"={self.max_tokens}; lower it",
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InputError(Name("stop"), f" holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are possible")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InputError(Name("stop"), f" holds {text!r}; give non-empty strings")
            if len(text) > MAX_STOP_LENGTH:
                raise InputError(
                    Name("stop"), f" holds one of {len(text)} characters; at most {MAX_STOP_LENGTH} are possible"
                )
        if self.stop and not self.detokenize:
            raise InputError(
                Name("stop"), " strings need text, and detokenize is False; set it to True or use stop_token_ids"
            )
        if self.pooling not in (None, *POOLINGS):
            raise InputError(Name("pooling"), f" is {self.pooling!r}; give one of {', '.join(POOLINGS)}")
        if self.pooling and (self.n, self.max_tokens) != (1, 1):
            raise InputError(Name("pooling"), " makes one embedding and no tokens; leave n and max_tokens at 1")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            kind = type(self.structured_outputs).__name__
            raise InputError(
                Name("structured_outputs"), f" is a {kind}; give a StructuredOutputsParams, or a dict of its fields"
            )
        for token in self.stop_token_ids:
            _check_token(token, "stop_token_ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InputError(Name("allowed_token_ids"), " is empty; give at least one token id, or leave it out")
        for token in self.allowed_token_ids or ():
            _check_token(token, "allowed_token_ids")
        if not isinstance(self.logit_bias, dict | None):
            raise InputError(
                Name("logit_bias"), f" is a {type(self.logit_bias).__name__}; give a dict of token ids to numbers"
            )
        for token, bias in (self.logit_bias or {}).items():
            _check_token(token, "logit_bias")
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise InputError(Name("logit_bias"), f"[{token}] is {bias!r}; give a number between -100 and 100")

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            allowed = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
            raise InputError(Name(name), f" is {value!r}; give a number {allowed}")

    def _integer(self, name: str, low: int, high: int, *, meaning: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(Name(name), f" is {value!r}; give an integer {meaning or f'between {low} and {high}'}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_token(token: Any, field: str) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise InputError(Name(field), f" holds {token!r}; give token ids, which are integers from 0 on")
