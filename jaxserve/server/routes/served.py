"""What the endpoints serve."""

import dataclasses
import time
from typing import NamedTuple

from jaxserve.server.core.client import EngineClient
from jaxserve.server.errors import ApiError


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
    def adapters(self) -> tuple[str, ...]:
        return self.engine.inputs.limits.adapters

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
