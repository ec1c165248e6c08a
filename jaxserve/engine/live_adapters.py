"""The adapters that requests may name, which come and go while the engine runs."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.checkpoint.adapters import Adapter, Adapters
from jaxserve.engine.input_processor import InputProcessor
from jaxserve.errors import InputError, Name
from jaxserve.runner.runner import Runner


class _Placed(NamedTuple):
    place: int  # on the devices, from 1 on
    number: int  # which no other adapter ever has, so that none finds another one's cached prefixes


class LiveAdapters:
    """Keeps `inputs.adapters`, those that requests may name, and knows which place each has.

    `in_use` tells the places of all requests that have not ended; 0 is no place. But for `read`, all is for the
    engine's thread.
    """

    def __init__(
        self, adapters: Adapters | None, runner: Runner, inputs: InputProcessor, in_use: Callable[[], set[int]]
    ):
        self._adapters, self._runner, self._inputs, self._in_use = adapters, runner, inputs, in_use
        self._count = adapters.places if adapters else 0
        self._numbers = itertools.count(1)
        self._placed = {name: _Placed(place, next(self._numbers)) for place, name in enumerate(inputs.adapters, 1)}

    def of(self, name: str | None) -> tuple[int, int]:
        """Its place, and a number that is its own; zeros for no adapter. `InputError` if there is none of that name."""
        if name is None:
            return 0, 0
        if name not in self._placed:  # though it was there when the request was checked
            raise InputError(Name("adapter"), f" {name!r} has been unloaded; name another one, or leave it out")
        return self._placed[name]

    def read(self, name: str, path: str) -> Adapter:
        """An adapter to `put`, of a directory or an id of the hub; for any thread. `InputError` if it is none."""
        if self._adapters is None or not self._count:
            raise InputError("this engine has no place for adapters; start it with max_loras")
        return self._adapters.read(name, path)

    def put(self, adapter: Adapter, path: str) -> None:
        """Let requests name it. `InputError` if its name or all places are taken."""
        place = self._free_place(adapter.name)
        self._runner.put_adapter(place - 1, adapter)
        self._placed[adapter.name] = _Placed(place, next(self._numbers))
        self._inputs.adapters[adapter.name] = path

    def remove(self, name: str) -> None:
        """Let no more requests name it. Those that did end with it, and then its place is free."""
        if name not in self._placed:
            raise InputError(f"there is no adapter {name!r} to unload")
        del self._placed[name]
        self._inputs.adapters.pop(name, None)

    def _free_place(self, name: str) -> int:
        if name in self._placed:
            raise InputError(f"there is an adapter {name!r} already; unload it first, or give this one another name")
        named = {placed.place for placed in self._placed.values()}
        leaving = self._in_use() - named - {0}
        free = [place for place in range(1, self._count + 1) if place not in named | leaving]
        if not free:
            wait = f", {len(leaving)} of them by requests whose adapter is unloaded" if leaving else ""
            raise InputError(
                f"all places for adapters are taken, {self._count} of them{wait}; unload one, or start with a larger "
                "max_loras"
            )
        return free[0]
