"""From structured outputs to llguidance's matchers, which know at each token what the next ones may be."""

import dataclasses
import json
import re
import textwrap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve import lark
from jaxserve.errors import InputError
from jaxserve.limited_process import LimitedProcess
from jaxserve.sampling_params import ChatGrammar, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SECONDS = 1.0  # of CPU time that a grammar may take to compile
MAX_BYTES = 2**26  # of memory that it may take
# Beside llguidance's own; `Constraint` bounds the time of each sequence.
LIMITS: dict[str, Any] = {
    "step_max_items": 20_000,
    "max_items_in_row": 5_000,  # an object takes four for each property that may be left out
    "max_lexer_states": 100_000,  # up to some 150 MB a sequence, in the long run
    "verbose_errors": False,
}


_KEPT = 256  # compiled grammars
_KEPT_SECONDS = 5.0  # of compiling, since memory goes with that: up to 100 MB a second
_MOST_TOLD = 300  # characters of what llguidance says of a grammar
_PLACE = re.compile(r"^at \d+\(\d+\): ")  # in our own text, which its user has not seen

_Key = tuple[StructuredOutputsParams | None, ChatGrammar | None]


@dataclasses.dataclass(frozen=True)
class _Kept:
    matcher: "LLMatcher | None"
    refusal: str  # why there is none
    seconds: float  # that it took


class Grammars:
    """Compiles grammars over one tokenizer's tokens, and keeps the newest. For any thread.

    Each is tried in another process first, so that its time and memory are bounded. Compiling lets go of the
    interpreter.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._special = lark.special_tokens(tokenizer)
        self._tokens: LLTokenizer | None = None  # made at first use: it takes up to a second
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._kept_seconds = 0.0
        self._lock, self._tokens_lock = threading.Lock(), threading.Lock()
        self._trial = LimitedProcess(
            Path(__file__).with_name("grammar_process.py"),
            *(str(MAX_BYTES), str(vocab_size), json.dumps(self._special)),
            *(json.dumps(self._eos_token_ids), json.dumps(LIMITS)),
            seconds=SECONDS,
        )

    def prepare(self) -> None:
        """Load what the first grammar would wait for, if there can be one."""
        if self._tokenizer is not None:
            self.compiled(SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)))

    def knows(self, params: SamplingParams) -> bool:
        """Whether `compiled` has its answer ready, and for a while: it is then the last that is forgotten."""
        with self._lock:
            return params.grammar is None or self._find(params.grammar) is not None

    def compiled(self, params: SamplingParams) -> "LLMatcher | None":
        """A matcher at its beginning, to be copied; `InputError` if what is asked for is wrong or beyond the limits.

        None if these settings leave the text to the model.
        """
        key = params.grammar
        if key is None:
            return None
        with self._lock:
            kept = self._find(key)
        if kept is None:
            kept = self._compile(*key)
            with self._lock:
                self._keep(key, kept)
        if kept.matcher is None:
            raise self._refusal(params, kept.refusal)
        return kept.matcher

    def _compile(self, wanted: StructuredOutputsParams | None, chat: ChatGrammar | None) -> _Kept:
        from llguidance import LLMatcher, LLParserLimits  # here, since most engines never need them

        tokens = self._ll_tokenizer()
        if wanted and wanted.grammar is not None:
            converted = self._trial.ask({"gbnf": wanted.grammar})
            if "error" in converted:
                return _Kept(None, converted["error"], 0.0)
            wanted = dataclasses.replace(wanted, grammar=converted["lark"])
        text = f"{chat.rules if chat else 'start: content'}\n{lark.rule('content', wanted)}"
        if self._special_in_text(text):
            # The text that a grammar forces is made of tokens, and a special token's name of that token, which is none
            # of the text. So nothing is forced here: the model may write it in any tokens.
            text = f'%llguidance {{"no_forcing": true}}\n{text}'
        tried = self._trial.ask({"grammar": text})
        if "error" in tried:
            return _Kept(None, tried["error"], 0.0)
        matcher = LLMatcher(tokens, text, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            return _Kept(None, matcher.get_error(), 0.0)
        return _Kept(matcher, "", tried["seconds"])

    def _find(self, key: _Key) -> _Kept | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _keep(self, key: _Key, new: _Kept) -> None:
        before = self._kept.pop(key, None)  # of another thread, which compiled the same
        self._kept[key] = new
        self._kept_seconds += new.seconds - (before.seconds if before else 0.0)
        while len(self._kept) > _KEPT or (self._kept_seconds > _KEPT_SECONDS and len(self._kept) > 1):
            _, oldest = self._kept.popitem(last=False)
            self._kept_seconds -= oldest.seconds

    def _refusal(self, params: SamplingParams, reason: str) -> InputError:
        """Tells what is wrong: the structured outputs, or else the tools that they stand beside."""
        wanted = params.structured_outputs
        if params.chat_grammar is None:
            name, field = (wanted.name, wanted.given_as) if wanted else ("", None)
        else:
            if wanted is not None:
                self.compiled(dataclasses.replace(params, chat_grammar=None))
            name = field = "tools"
        told = textwrap.shorten(_PLACE.sub("", lark.told(reason)), _MOST_TOLD, placeholder=" ...")
        return InputError(f"{name} cannot be followed ({told}); mend it", field=field)

    def _special_in_text(self, text: str) -> bool:
        return any(name in text or json.dumps(name)[1:-1] in text for name in self._special)

    def _ll_tokenizer(self) -> "LLTokenizer":
        with self._tokens_lock:
            if self._tokens is None:
                from llguidance.hf import from_tokenizer

                self._tokens = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids) or None
                )
            return self._tokens
