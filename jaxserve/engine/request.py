"""One sequence on its way through the engine."""

import dataclasses
import enum

from jaxserve.engine.constraint import Constraint
from jaxserve.engine.page_pool import Key, page_keys
from jaxserve.sampling_params import SamplingParams


class State(enum.Enum):
    WAITING = enum.auto()  # holds no slot and no pages
    RUNNING = enum.auto()  # holds a slot and pages
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt that grows by one completion. Requests with `n` above 1 are that many of these.

    While it decodes, how far it has come stands in the scheduler's arrays; here are the tokens that the host has seen.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int  # of this completion
    max_tokens: int  # of this completion: what was asked for, within the model's length
    arrival: int  # a running number
    priority: int = 0  # lower runs first
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included, unless ignored
    adapter: int = 0  # its running number from 1 on; 0: none
    needs: int = 0  # what of sampling it needs: a `Needs` value
    cache_salt: Key | None = b""  # what its pages' keys begin with; None keeps it out of the prefix cache
    constraint: Constraint | None = None  # None once it binds no longer, too
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    state: State = State.WAITING
    slot: int = -1
    pages: list[list[int]] = dataclasses.field(default_factory=list)  # by group of layers: `PageTables`'
    page_keys: list[Key] = dataclasses.field(default_factory=list)  # of the first full pages, as far as they are made
    num_computed: int = 0  # tokens whose keys and values are in pages, once the dispatched prefill steps are done
    num_cached: int = 0  # prompt tokens that the prefix cache spared it when it was first admitted
    num_sampled: int = 0  # tokens that dispatched steps have sampled for it by the time that it was last preempted
    seen_at: float | None = None  # when the host saw the newest of its tokens by then

    @property
    def num_known(self) -> int:
        """Tokens of prompt and completion that the host has seen."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def order(self) -> tuple[int, int]:
        """What is served first sorts first."""
        return (self.priority, self.arrival)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of prompt and completion, all of them known."""
        prompt = len(self.prompt_token_ids)
        output = self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]
        return self.prompt_token_ids[start:stop] + output

    def keys_of_full_pages(self, tokens: int, page_size: int) -> list[Key]:
        """The keys of the full pages within the first `tokens` tokens, all of them known; none outside the cache."""
        if self.cache_salt is None:
            return []
        pages = tokens // page_size
        if (done := len(self.page_keys)) < pages:
            before = self.page_keys[-1] if done else self.cache_salt
            self.page_keys += page_keys(self.token_ids(done * page_size, pages * page_size), page_size, before)
        return self.page_keys[:pages]
