"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters that come and go while the server runs."""

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import InputError
from jaxserve.server.incoming import read_body
from jaxserve.server.openapi import Operation, describes
from jaxserve.server.protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest, UnloadedAdapter
from jaxserve.server.protocol.models import ModelCard
from jaxserve.server.routes.reply import json_response
from jaxserve.server.routes.served import Served


class Adapters:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(
            summary="One more adapter, which requests may name as their model",
            takes=LoadAdapterRequest,
            answers=ModelCard,
        )
    )
    async def load(self, request: Request) -> Response:
        body = await read_body(request, LoadAdapterRequest)
        name = body.lora_name
        if name == self._served.name:
            raise InputError(f"{name!r} is the model's own name; give the adapter another one", field="lora_name")
        await self._served.engine.load_adapter(name, body.lora_path)
        return json_response(self._served.card(self._served.asked(name)))

    @describes(
        Operation(
            summary="No more requests to this adapter",
            takes=UnloadAdapterRequest,
            answers=UnloadedAdapter,
            errors=(404,),
        )
    )
    async def unload(self, request: Request) -> Response:
        """Those that run end with it."""
        body = await read_body(request, UnloadAdapterRequest)
        name = body.lora_name
        if self._served.asked(name).adapter is None:
            raise InputError(f"{name!r} is the model itself; name an adapter", field="lora_name")
        await self._served.engine.unload_adapter(name)
        return json_response(UnloadedAdapter(id=name, object="model", deleted=True))
