"""What the server and the engine core say to each other. msgpack on the wire: nothing that is read can run code."""

from typing import Any

import msgspec

from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine.input_processor import CheckedInput, Limits
from jaxserve.errors import Name
from jaxserve.outputs import CompletionOutput, Logprobs, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.stats import EngineStats


class Message(msgspec.Struct, tag=True, array_like=True):
    """An array on the wire, which begins with the name of its type."""


# To the core


class Start(Message):
    """The first message: load this."""

    config: EngineConfig
    log_level: str
    log_format: str


class Add(Message):
    """Queue these requests, checked, by their ids: all of them, or none."""

    requests: dict[str, CheckedInput]
    params: SamplingParams
    priority: int
    cache_salt: str
    stream: bool  # whether every step's tokens are wanted, or each completion's at its end


class Abort(Message):
    """Whoever waited for these has left."""

    request_ids: list[str]


class LoadAdapter(Message):
    """Let requests name one more adapter. Wants an `AdapterChanged`."""

    name: str
    path: str


class UnloadAdapter(Message):
    """Let no more requests name it. Wants an `AdapterChanged`."""

    name: str


class Ping(Message):
    """Wants a `Pong`, which comes between two steps."""


# From the core


class Progress(Message):
    """How far loading is."""

    stage: str
    done: int
    total: int


class CannotLoad(Message):
    """The setting or the checkpoint is the user's to mend. The last message."""

    sentence: str


class Ready(Message):
    """Loading is done: what requests may ask of this engine, and what is told of it."""

    config: ResolvedConfig
    limits: Limits
    sampling_defaults: dict[str, Any]
    attention: str
    startup_seconds: dict[str, float]
    pid: int  # of its process


class Delta(msgspec.Struct, array_like=True):
    """What a step added to one request. Its prompt stays where it is known."""

    request_id: str
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None  # of a request that has ended
    prompt_logprobs: list[Logprobs | None] | None
    embedding: list[float] | None


class Stepped(Message):
    """A step has run: which requests have begun with it, and what the one before it added."""

    begun: list[str]
    deltas: list[Delta]


class Refused(Message):
    """None of these requests runs."""

    request_ids: list[str]
    parts: list[str | Name]  # of the `InputError` that says why
    field: str | None  # which it is about


class AdapterChanged(Message):
    """The adapters are as they were to be, or as they were before for the reason of an `InputError`."""

    refused: list[str | Name] | None  # its parts


class Pong(Message):
    """The core is between two steps, or has none to run: this is where it stands."""

    stats: EngineStats


ToCore = Start | Add | Abort | LoadAdapter | UnloadAdapter | Ping
FromCore = Progress | CannotLoad | Ready | Stepped | Refused | AdapterChanged | Pong
