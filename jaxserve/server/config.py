"""Every setting of the server; those of its engine are `EngineConfig`'s."""

import dataclasses

from jaxserve.config import Settings, setting
from jaxserve.errors import InputError

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(Settings):
    """How the server listens, whom it answers, and how much it takes on."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 takes calls from other machines")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    served_model_name: str | None = setting(None, "what clients call the model; the name of its directory if left out")
    ssl_certfile: str | None = setting(None, "certificate to answer HTTPS with, in PEM")
    ssl_keyfile: str | None = setting(None, "its private key, if that is in another file")
    api_key_file: str | None = setting(
        None,
        "file of API keys, one a line, with a name for the log before it if you like; every request but those to "
        "/health, /ready and the page's files then has to bring one. Without it, everybody is answered",
    )
    max_requests_per_key: int | None = setting(None, "requests of one API key at the same time; no limit if left out")
    allowed_origins: tuple[str, ...] = setting((), "web origin whose pages may call this server, or * for all")
    max_queued_requests: int = setting(
        2048, "completions that may wait while max_num_seqs run; what goes beyond is refused with status 429"
    )
    max_queued_tokens: int = setting(4_194_304, "prompt tokens that may wait; what goes beyond is refused likewise")
    queue_timeout: float | None = setting(
        None, "seconds that a request may wait for its first step; no limit if left out"
    )
    request_timeout: float | None = setting(None, "seconds that a request may take in all; no limit if left out")
    max_body_bytes: int = setting(16 * 2**20, "bytes that a request's body may have")
    read_timeout: float = setting(60.0, "seconds that a client may take to send a request")
    drain_timeout: float = setting(
        20.0, "seconds that running requests have to end after SIGTERM or Ctrl-C; a second signal ends them at once"
    )
    health_timeout: float = setting(
        20.0, "seconds within which the engine has to end a step, or to say that it has none, for /health to be good"
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        "URL that a span for each request is sent to, as OpenTelemetry's OTLP over HTTP, such as "
        "http://localhost:4318/v1/traces; pip install 'jaxserve[otel]' brings what it needs",
    )
    log_level: str = setting("info", f"least grave of what is logged: {', '.join(LOG_LEVELS)}; info tells each request")
    log_format: str = setting("text", f"what a line of the log is: {' or '.join(LOG_FORMATS)}")
    log_prompts: bool = setting(False, "log prompts too")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("log_level", LOG_LEVELS)
        self._one_of("log_format", LOG_FORMATS)
        self._at_least(1, "max_requests_per_key", "max_queued_requests", "max_queued_tokens", "max_body_bytes")
        self._at_least(0, "queue_timeout", "request_timeout", "read_timeout", "drain_timeout", "health_timeout")
        if not 0 <= self.port < 2**16:
            raise InputError(f"port is {self.port!r}; give an integer from 0 to 65535")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise InputError("ssl_keyfile is given and ssl_certfile is not; give both, or neither")
        if self.otlp_traces_endpoint is not None:
            self._check_traces(self.otlp_traces_endpoint)
        if self.max_requests_per_key is not None and self.api_key_file is None:
            raise InputError("max_requests_per_key is given and api_key_file is not; give both, or neither")

    def _check_traces(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise InputError(
                f"otlp_traces_endpoint is {endpoint!r}; give a URL of OTLP over HTTP, such as "
                "http://localhost:4318/v1/traces"
            )
        try:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"otlp_traces_endpoint is given and OpenTelemetry is not installed ({error}); "
                "pip install 'jaxserve[otel]', or leave it out"
            ) from error
