"""What the next token of a sequence may be, where that depends on the tokens before it."""

import enum
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from jaxserve import lark
from jaxserve.runner.step_batch import MASK_WORD_BITS
from jaxserve.sampling_params import Thinking

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MOST_BLANK = 2  # tokens between thinking and what is bound
# CPU time that a sequence may take of everybody's steps with its grammar. Most take 0.05 ms for each token.
_SECONDS, _SECONDS_PER_TOKEN = 0.5, 0.002


class _Stage(enum.Enum):
    OPENING = enum.auto()  # it may begin to think, or not
    THINKING = enum.auto()
    CLOSING = enum.auto()  # its thinking is being ended for it
    BETWEEN = enum.auto()  # behind the thinking, and before the first token that is bound
    BOUND = enum.auto()


class Constraint:
    """A sequence's thinking, within its budget and free otherwise, and after it a grammar, if there is one.

    While it is `binding`, the host has to see each token before the next one may be sampled. `compiled` is copied when
    it is first needed, which is when the sequence runs. Thinking is not left by the tokens `ends` of a sequence's end
    where something is bound behind it: nothing would follow the grammar.
    """

    def __init__(self, compiled: "LLMatcher | None", thinking: Thinking | None, ends: Collection[int] = ()):
        self._compiled, self._ends = compiled, ends
        self._copy: LLMatcher | None = None
        self._seconds_left = _SECONDS
        self._thinking = thinking or Thinking(end=())
        self._stage = _Stage.BOUND if thinking is None else _Stage.OPENING
        self._within = self._thinking.in_grammar and compiled is not None  # thinking follows the grammar as well
        self._seen = 0  # tokens of this stage
        self._recent: tuple[int, ...] = ()  # the last tokens of the thinking, as many as its end has
        if thinking is not None and not thinking.start:
            self._think()

    @property
    def binding(self) -> bool:
        return self._compiled is not None or self._stage in (_Stage.OPENING, _Stage.THINKING, _Stage.CLOSING)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._stage is _Stage.BOUND and self._compiled is not None and self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further, as where a step of it would take too long."""
        if self._seconds_left < 0:
            return "Its steps take too long: the grammar is too ambiguous or too large"
        if self._copy is None or not self._copy.is_error():
            return None
        return lark.told(self._copy.get_error())

    def allow(self, mask: np.ndarray) -> bool:
        """Set the bits of the tokens that may come next in `mask`, uint32 `[words]`, all 0; False if any may."""
        match self._stage:
            case _Stage.CLOSING:
                _allow(mask, self._thinking.closing[self._seen])
                return True
            case _Stage.OPENING if self._seen and self._compiled is not None and not self._within:
                _allow(mask, self._thinking.start[self._seen])
                return True
            case _Stage.THINKING if not self._within:
                if self._compiled is None or not self._ends:
                    return False
                mask[:] = ~np.uint32(0)
                for token in self._ends:
                    mask[token // MASK_WORD_BITS] &= ~np.uint32(1 << token % MASK_WORD_BITS)
                return True
        if self._compiled is None:
            return False
        start = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._seconds_left -= time.thread_time() - start
        if self._stage is _Stage.OPENING and not self._within:
            _allow(mask, self._thinking.start[0])
        elif self._stage is _Stage.BETWEEN and self._seen < _MOST_BLANK:
            _allow(mask, *self._thinking.blank)
        return True

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        if self._within:
            self._consume(token)
        match self._stage:
            case _Stage.OPENING:
                self._open(token)
            case _Stage.THINKING:
                self._recent = (*self._recent, token)[-len(self._thinking.end) :]
                if self._recent == self._thinking.end:
                    self._end_thinking()
                else:
                    self._seen += 1
                    self._keep_to_budget()
            case _Stage.CLOSING:
                self._seen += 1
                if self._seen == len(self._thinking.closing):
                    self._end_thinking()
            case _Stage.BETWEEN if self._may_skip(token):
                self._seen += 1
            case _Stage.BETWEEN | _Stage.BOUND:
                self._follow(token)

    @property
    def _matcher(self) -> "LLMatcher":
        if self._copy is None:
            if self._compiled is None:
                raise ValueError("there is no grammar")
            self._copy = self._compiled.deep_copy()
        return self._copy

    def _enter(self, stage: _Stage) -> None:
        self._stage, self._seen = stage, 0

    def _open(self, token: int) -> None:
        if token != self._thinking.start[self._seen]:
            self._follow(token)
        elif self._seen + 1 == len(self._thinking.start):
            self._think()
        else:
            self._seen += 1

    def _think(self) -> None:
        self._enter(_Stage.THINKING)
        self._keep_to_budget()

    def _keep_to_budget(self) -> None:
        budget = self._thinking.budget
        if budget is not None and self._seen >= budget:
            self._enter(_Stage.CLOSING)

    def _end_thinking(self) -> None:
        self._enter(_Stage.BOUND if self._within else _Stage.BETWEEN)

    def _may_skip(self, token: int) -> bool:
        return (
            token in self._thinking.blank
            and self._seen < _MOST_BLANK
            and not (self._compiled is not None and self._matcher.validate_tokens([token]))
        )

    def _follow(self, token: int) -> None:
        self._enter(_Stage.BOUND)
        if self._compiled is not None and not self._within:
            self._consume(token)

    def _consume(self, token: int) -> None:
        start = time.thread_time()
        self._matcher.consume_token(token)
        self._seconds_left += _SECONDS_PER_TOKEN - (time.thread_time() - start)


def _allow(mask: np.ndarray, *tokens: int) -> None:
    for token in tokens:
        mask[token // MASK_WORD_BITS] |= np.uint32(1 << token % MASK_WORD_BITS)
