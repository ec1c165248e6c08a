"""Every setting of the server; those of its engine are `EngineConfig`'s."""

import dataclasses

from jaxserve.config import Settings, setting
from jaxserve.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(Settings):
    """How the server listens, whom it answers, and how much it takes on."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 takes calls from other machines")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    served_model_name: str | None = setting(None, "what clients call the model; the name of its directory if left out")
    max_queued_requests: int = setting(
        2048, "completions that may wait while max_num_seqs run; what goes beyond is refused with status 429"
    )
    max_queued_tokens: int = setting(4_194_304, "prompt tokens that may wait; what goes beyond is refused likewise")
    queue_timeout: float | None = setting(
        None, "seconds that a request may wait for its first step; no limit if left out"
    )
    request_timeout: float | None = setting(None, "seconds that a request may take in all; no limit if left out")
    drain_timeout: float = setting(
        20.0, "seconds that running requests have to end after SIGTERM or Ctrl-C; a second signal ends them at once"
    )
    health_timeout: float = setting(
        20.0, "seconds within which the engine has to end a step, or to say that it has none, for /health to be good"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "max_queued_requests", "max_queued_tokens")
        self._at_least(0, "queue_timeout", "request_timeout", "drain_timeout", "health_timeout")
        if not 0 <= self.port < 2**16:
            raise InputError(f"port is {self.port!r}; give an integer from 0 to 65535")
