"""The web application: which path goes where."""

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.routing import Route

from jaxserve.server.core.client import EngineClient
from jaxserve.server.errors import EXCEPTION_HANDLERS
from jaxserve.server.routes.chat import Chat
from jaxserve.server.routes.completions import Completions
from jaxserve.server.routes.messages import Messages
from jaxserve.server.routes.responses import Responses
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.status import Status


def build_app(engine: EngineClient, served_model_name: str) -> Starlette:
    """OpenAI's API on `engine`, which runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine:
            yield

    served = Served(engine, served_model_name)
    status, responses, messages = Status(served), Responses(served), Messages(served)
    routes = [
        Route("/v1/completions", Completions(served).create, methods=["POST"]),
        Route("/v1/chat/completions", Chat(served).create, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{response_id}", responses.retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/v1/models", status.models, methods=["GET"]),
        Route("/health", status.health, methods=["GET"]),
        Route("/ready", status.ready, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS, lifespan=lifespan)
