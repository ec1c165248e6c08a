"""Replicas of the server on a cluster, started, watched and balanced by Ray Serve.

serve run jaxserve.server.ray_serve:app model=/models/Qwen3-8B
serve run configs/deployment/ray-serve.yaml
"""

import contextlib
from typing import Any

import yaml
from ray import serve
from starlette.applications import Starlette

from jaxserve.config import EngineConfig
from jaxserve.server import logs
from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import served_name, started_engine


@serve.deployment
@serve.ingress()
class Replica:
    """One server, with an engine of its own. Ray counts what a replica needs: give it `num_gpus`."""

    def __init__(self, settings: dict[str, Any]):
        self._ending = contextlib.ExitStack()
        config, server = EngineConfig.from_settings(settings), ServerConfig()
        logs.configure(server.log_level, server.log_format)
        try:
            self._engine = self._ending.enter_context(started_engine(config, server))
        except SystemExit as error:  # which would tell Ray nothing
            raise RuntimeError(str(error)) from error
        self._app = build_app(self._engine, served_name(config, server), server)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    def check_health(self) -> None:
        """Ray asks from time to time, and replaces a replica that raises."""
        if self._engine.has_failed:
            raise RuntimeError("the engine has stopped after an error; the replica's log has it")

    def __del__(self) -> None:
        self._ending.close()


def app(settings: dict[str, Any]) -> serve.Application:
    """The application of `settings`, which are those of `EngineConfig`; a command line gives all of them as texts."""
    read = {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in settings.items()}
    return Replica.bind(read)  # type: ignore[attr-defined]
