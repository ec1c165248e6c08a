"""The web application: which path goes where."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Mount, Route

from jaxserve.server.config import ServerConfig
from jaxserve.server.core.client import EngineClient
from jaxserve.server.errors import EXCEPTION_HANDLERS
from jaxserve.server.incoming import BodyLimit
from jaxserve.server.keys import ApiKeys, RequireKey
from jaxserve.server.openapi import Description
from jaxserve.server.request_log import RequestLog
from jaxserve.server.routes import page
from jaxserve.server.routes.adapters import Adapters
from jaxserve.server.routes.chat import Chat
from jaxserve.server.routes.completions import Completions
from jaxserve.server.routes.embeddings import Embeddings
from jaxserve.server.routes.messages import Messages
from jaxserve.server.routes.metrics import Scrapes
from jaxserve.server.routes.responses import Responses
from jaxserve.server.routes.score import Scores
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.stats import Stats
from jaxserve.server.routes.status import Status
from jaxserve.server.routes.tokenization import Tokenization
from jaxserve.server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from jaxserve.server.telemetry.traces import Traces

_DEFAULTS = ServerConfig()


def build_app(
    engine: EngineClient, served_model_name: str, config: ServerConfig = _DEFAULTS, keys: ApiKeys | None = None
) -> Starlette:
    """OpenAI's API on `engine`, which runs while the application does; for everybody if there are no keys."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine:
            yield
        if traces:
            await asyncio.to_thread(traces.close)

    served = Served(engine, served_model_name)
    metrics, traces = Metrics(engine.ready, served_model_name), _traces(config, served_model_name)
    engine.observers += [metrics, traces] if traces else [metrics]
    status, tokenization = Status(served), Tokenization(served)
    adapters = Adapters(served)
    responses, messages = Responses(served), Messages(served)
    routes: list[BaseRoute] = [
        Route("/v1/completions", Completions(served).create, methods=["POST"]),
        Route("/v1/chat/completions", Chat(served).create, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{response_id}", responses.retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/v1/embeddings", Embeddings(served).create, methods=["POST"]),
        Route("/score", Scores(served).create, methods=["POST"]),
        Route("/v1/models", status.models, methods=["GET"]),
        Route("/v1/models/{model:path}", status.model, methods=["GET"]),
        Route("/v1/load_lora_adapter", adapters.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", adapters.unload, methods=["POST"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenization.info, methods=["GET"]),
        Route("/version", status.version, methods=["GET"]),
        Route("/health", status.health, methods=["GET"]),
        Route("/ready", status.ready, methods=["GET"]),
        Route("/stats", Stats(served).show, methods=["GET"]),
        Route("/metrics", Scrapes(served, metrics).show, methods=["GET"]),
        *page.ROUTES,
    ]
    routes.append(Route("/openapi.json", Description(routes).show, methods=["GET"]))
    metrics.routes = {  # a path without the kinds of its parameters
        _endpoint(route): route.path_format if isinstance(route, Route) else route.path
        for route in routes
        if isinstance(route, Route | Mount)
    }
    return Starlette(
        routes=routes,
        middleware=_layers(config, keys, metrics),
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )


def _traces(config: ServerConfig, served_model_name: str) -> "Traces | None":
    if config.otlp_traces_endpoint is None:
        return None
    from jaxserve.server.telemetry.traces import Traces  # on demand, as it needs an extra

    return Traces(config.otlp_traces_endpoint, served_model_name)


def _endpoint(route: Route | Mount) -> Any:
    """What a request's scope has under that name when the route has it."""
    return route.app if isinstance(route, Mount) else route.endpoint


def _layers(config: ServerConfig, keys: ApiKeys | None, metrics: Metrics) -> list[Middleware]:
    """What a request passes on its way to its route, from the outside in."""
    layers = [Middleware(RequestLog, on_response=metrics.responded)]
    if config.allowed_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    if keys is not None:
        layers.append(
            Middleware(RequireKey, keys=keys, max_requests=config.max_requests_per_key, on_refused=metrics.refused)
        )
    return [*layers, Middleware(BodyLimit, max_bytes=config.max_body_bytes, seconds=config.read_timeout)]
