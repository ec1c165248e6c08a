"""A process that runs a model's steps together with the first one, which decides on them."""

from jaxserve.engine.startup import Loaded


def follow(loaded: Loaded) -> None:
    """Start every step that the first process starts, until that one closes its engine.

    `InputError` if it ends before that.
    """
    for batch in loaded.processes.messages():
        loaded.runner.dispatch(batch)
    loaded.runner.close()
