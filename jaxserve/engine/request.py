"""One sequence on its way through the engine."""

import dataclasses
import enum

from jaxserve.sampling_params import SamplingParams


class State(enum.Enum):
    WAITING = enum.auto()  # holds no slot and no pages
    RUNNING = enum.auto()  # holds a slot and pages
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt that grows by one completion. Requests with `n` above 1 are that many of these.

    The engine runs one step ahead, so the newest token may still be on the device: `in_flight` counts it, and its
    value is known once the step has been collected.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int  # of this completion
    max_tokens: int  # of this completion: what was asked for, within the model's length
    arrival: int  # a running number
    priority: int = 0  # lower runs first
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included, unless ignored
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    state: State = State.WAITING
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in pages, or will be when the dispatched steps are done
    decoding: bool = False  # whether only the newest token, which the device has, is not computed yet
    in_flight: int = 0  # tokens sampled by a dispatched step and not collected yet

    @property
    def num_tokens(self) -> int:
        """Prompt and completion, with what is in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.in_flight

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids) + self.in_flight

    @property
    def order(self) -> tuple[int, int]:
        """What is served first sorts first."""
        return (self.priority, self.arrival)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of prompt and completion, all of them known."""
        prompt = len(self.prompt_token_ids)
        output = self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]
        return self.prompt_token_ids[start:stop] + output
