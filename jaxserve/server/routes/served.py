"""What the endpoints serve."""

import dataclasses
import time
from typing import NamedTuple

from jaxserve.server.core.client import EngineClient
from jaxserve.server.errors import ApiError
from jaxserve.server.protocol.models import ModelCard


class Asked(NamedTuple):
    """What a request means by `model`."""

    name: str
    adapter: str | None = None  # of the one model


@dataclasses.dataclass(frozen=True)
class Served:
    """The one model, under the name that clients know it by, and with each of its adapters under that one's name."""

    engine: EngineClient
    name: str
    since: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def adapters(self) -> dict[str, str]:
        """What each was loaded from, by its name."""
        return self.engine.inputs.adapters

    def asked(self, model: str | None) -> Asked:
        """What clients mean by this name; without one, the model itself. `ApiError` 404 if it is nobody's."""
        if model is None or model == self.name:
            return Asked(self.name)
        if model in self.adapters:
            return Asked(model, model)
        names = ", ".join(map(repr, (self.name, *self.adapters)))
        raise ApiError(
            404, f"there is no model {model!r}; this server has {names}", param="model", code="model_not_found"
        )

    def card(self, asked: Asked) -> ModelCard:
        """What clients are told of it."""
        return ModelCard(
            id=asked.name,
            object="model",
            created=self.since,
            owned_by="jaxserve",
            root=self.engine.ready.config.model if asked.adapter is None else self.adapters[asked.adapter],
            parent=None if asked.adapter is None else self.name,
            max_model_len=self.engine.max_model_len,
        )
