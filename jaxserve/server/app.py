"""The web application: which path goes where."""

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route

from jaxserve.server.async_engine import AsyncEngine
from jaxserve.server.errors import EXCEPTION_HANDLERS
from jaxserve.server.openapi import Description
from jaxserve.server.routes import page
from jaxserve.server.routes.chat import Chat
from jaxserve.server.routes.completions import Completions
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.stats import Stats
from jaxserve.server.routes.status import Status
from jaxserve.server.routes.tokenization import Tokenization


def build_app(engine: AsyncEngine, served_model_name: str) -> Starlette:
    """OpenAI's API on `engine`, which runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine:
            yield

    served = Served(engine, served_model_name)
    status, tokenization = Status(served), Tokenization(served)
    routes: list[BaseRoute] = [
        Route("/v1/completions", Completions(served).create, methods=["POST"]),
        Route("/v1/chat/completions", Chat(served).create, methods=["POST"]),
        Route("/v1/models", status.models, methods=["GET"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenization.info, methods=["GET"]),
        Route("/version", status.version, methods=["GET"]),
        Route("/health", status.health, methods=["GET"]),
        Route("/stats", Stats(served).show, methods=["GET"]),
        *page.ROUTES,
    ]
    routes.append(Route("/openapi.json", Description(routes).show, methods=["GET"]))
    return Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS, lifespan=lifespan)
