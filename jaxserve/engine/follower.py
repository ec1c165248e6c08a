"""A process that runs a model's steps together with the first one, which decides on them."""

from jaxserve.config import EngineConfig
from jaxserve.engine.startup import OnProgress, load


def follow(config: EngineConfig, on_progress: OnProgress) -> None:
    """Load this process's share, and start every step that the first process starts, until that one closes its engine.

    `InputError` if one of them cannot start, or ends before that.
    """
    loaded = load(config, on_progress)
    for batch in loaded.processes.messages():
        loaded.runner.dispatch(batch)
    loaded.runner.close()
