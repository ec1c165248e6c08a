"""What the endpoints serve."""

import dataclasses
import time

from jaxserve.server.core.client import EngineClient
from jaxserve.server.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Served:
    """The one model, under the name that clients know it by."""

    engine: EngineClient
    name: str
    since: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def check_name(self, asked: str | None) -> None:
        if asked is not None and asked != self.name:
            raise ApiError(
                404,
                f"there is no model {asked!r}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
