"""What the next token of a sequence may be, where that depends on the tokens before it."""

from typing import TYPE_CHECKING

import numpy as np

from jaxserve.runner.step_batch import MASK_WORD_BITS
from jaxserve.sampling_params import Thinking

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Constraint:
    """A sequence's thinking, within its budget and free otherwise, and after it a grammar, if there is one.

    While it is `binding`, the host has to see each token before the next one may be sampled.
    """

    def __init__(self, matcher: "LLMatcher | None", thinking: Thinking | None):
        self._matcher = matcher
        self._thinking = thinking
        self._maybe_thinking = thinking is not None and thinking.start is not None  # the first token tells
        self._recent: list[int] = []  # the last tokens of the thinking, as many as its end has
        self._spent = 0
        self._forced: list[int] = []  # what closes the thinking, the next token last

    @property
    def binding(self) -> bool:
        return self._thinking is not None or self._matcher is not None

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._thinking is None and self._matcher is not None and self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further, as where a step of it would take too long."""
        if self._matcher is None or not self._matcher.is_error():
            return None
        return self._matcher.get_error().strip().splitlines()[0]

    def allow(self, mask: np.ndarray) -> bool:
        """Set the bits of the tokens that may come next in `mask`, uint32 `[words]`; False if any may."""
        if self._forced:
            mask[:] = 0
            _allow_token(mask, self._forced[-1])
            return True
        if self._matcher is None or (self._thinking is not None and not self._maybe_thinking):
            return False
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._maybe_thinking and self._thinking is not None and self._thinking.start is not None:
            _allow_token(mask, self._thinking.start)
        return True

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        if self._thinking is not None and not self._leaves_thinking_out(self._thinking, token):
            self._think(self._thinking, token)
        elif self._matcher is not None:
            self._matcher.consume_token(token)

    def _leaves_thinking_out(self, thinking: Thinking, token: int) -> bool:
        """Whether this is the first token of a sequence that might have begun to think and does not."""
        if self._maybe_thinking:
            self._maybe_thinking = False
            if token != thinking.start:
                self._thinking = None
                return True
        return False

    def _think(self, thinking: Thinking, token: int) -> None:
        self._spent += 1
        self._recent = [*self._recent, token][-len(thinking.end) :]
        if tuple(self._recent) == thinking.end:
            self._thinking, self._forced = None, []
        elif self._forced:
            self._forced.pop()
            if not self._forced:
                self._thinking = None
        elif thinking.budget is not None and self._spent >= thinking.budget:
            self._forced = list(reversed(thinking.closing))


def _allow_token(mask: np.ndarray, token: int) -> None:
    mask[token // MASK_WORD_BITS] |= np.uint32(1 << token % MASK_WORD_BITS)
