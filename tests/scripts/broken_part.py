"""A part of the GPU check whose cases go wrong in every way that a kernel can."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax

from scripts.gpu.case import Case, Clock, NotRun, Row, Table

TABLE = Table("broken", "Cases that go wrong", {"time": "ms", "ok": ""})


def facts() -> dict:
    return {"device": "none"}


def _raise() -> Row:
    raise ValueError("no such kernel")


def _leave_out() -> Row:
    raise NotRun("it does not fit")


def _die() -> Row:
    os._exit(11)


def _hang() -> Row:
    time.sleep(600)
    return {}


def _lose_device(tried: Path) -> Row:
    """As after an illegal access: nothing is computed from there on, but by another process."""
    tried.touch()

    def refuse(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    jax.block_until_ready = refuse
    raise jax.errors.JaxRuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")


def cases(clock: Clock, ceilings: dict[str, float], folder: Path) -> Iterator[Case]:
    yield Case(TABLE, "first", lambda: {"time": 1.5, "ok": True})
    yield Case(TABLE, "raises", _raise)
    yield Case(TABLE, "left out", _leave_out)
    yield Case(TABLE, "kills its process", _die)
    yield Case(TABLE, "wrong", lambda: {"time": 2.5, "ok": False})
    yield Case(TABLE, "hangs", _hang, limit=1.0, kernel="slow")
    yield Case(TABLE, "hangs as well", _hang, limit=1.0, kernel="slow")
    yield Case(TABLE, "loses its device", partial(_lose_device, folder / "tried"))
    yield Case(TABLE, "last", lambda: {"time": ceilings.get("read", 3.5), "ok": (folder / "tried").exists()})
