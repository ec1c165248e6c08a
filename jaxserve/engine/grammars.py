"""From structured outputs to llguidance's matchers, which know at each token what the next ones may be."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.errors import InputError
from jaxserve.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # compiled grammars


class Grammars:
    """Compiles grammars over one tokenizer's tokens, and keeps the newest. For any thread.

    How long that takes is bounded by the size of what is given and by llguidance's own limits on grammars and regular
    expressions; it lets go of the interpreter meanwhile.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._tokens: LLTokenizer | None = None  # made at first use: it takes up to a second
        self._kept: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, wanted: StructuredOutputsParams) -> "LLMatcher":
        """A matcher at its beginning; `InputError` if `wanted` is wrong or beyond what is supported."""
        with self._lock:
            compiled = self._kept.get(wanted)
            if compiled is not None:
                self._kept.move_to_end(wanted)
        if compiled is None:
            compiled = self._compile(wanted)
            with self._lock:
                self._kept[wanted] = compiled
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return compiled.deep_copy()

    def _compile(self, wanted: StructuredOutputsParams) -> "LLMatcher":
        from llguidance import LLMatcher  # here, since most engines never need it

        matcher = LLMatcher(self._ll_tokenizer(), _grammar(wanted), log_level=0)
        if matcher.is_error():
            raise InputError(f"{wanted.form} cannot be followed ({_first_line(matcher.get_error())}); mend it")
        return matcher

    def _ll_tokenizer(self) -> "LLTokenizer":
        if self._tokenizer is None:
            raise InputError("structured_outputs need a tokenizer, and this engine was started without; leave them out")
        with self._lock:
            if self._tokens is None:
                from llguidance.hf import from_tokenizer

                self._tokens = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids) or None
                )
            return self._tokens


def _grammar(wanted: StructuredOutputsParams) -> str:
    """As llguidance takes it."""
    from llguidance import LLMatcher, grammar_from

    match wanted.form:
        case "json" | "json_object":
            options: Any = {"whitespace_flexible": not wanted.disable_any_whitespace}
            if wanted.whitespace_pattern is not None:
                options["whitespace_pattern"] = wanted.whitespace_pattern
            try:
                return LLMatcher.grammar_from_json_schema(wanted.json or '{"type": "object"}', overrides=options)
            except ValueError as error:
                raise InputError(f"json is no JSON ({_first_line(str(error))}); give a schema") from error
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, wanted.choice or ())))
        case "regex":
            return LLMatcher.grammar_from_regex(wanted.regex or "")
        case _:
            try:
                return grammar_from("grammar", wanted.grammar or "")
            except ValueError as error:
                raise InputError(f"grammar is none ({_first_line(str(error))}); give Lark's syntax or GBNF") from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
