"""What every part of the check is made of: tables, cases and the time that is left."""

import dataclasses
import time
from collections.abc import Callable

Row = dict[str, float | int | str | bool | None]  # by column; True and False in "ok" say whether a promise holds


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one kind. `units` names the columns, in order, each with its unit ("" for a plain number or a word)."""

    name: str
    title: str
    units: dict[str, str]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table. `run` measures it; it raises `NotRun` where there is a reason to leave it out."""

    table: Table
    name: str
    run: Callable[[], Row]
    limit: float = 90.0  # seconds after which it hangs: a kernel that waits for ever does not come back
    kernel: str = ""  # what it runs: behind one that hangs, no other case of its table with the same is begun


def kernel_case(table: Table, kernel: str, name: str, run: Callable[[], Row]) -> Case:
    """A case of one kernel, which takes seconds: to compile it, and its reference on the host where it has one."""
    return Case(table, name, run, limit=40.0, kernel=kernel)


class NotRun(Exception):
    """A case that this machine, or the time that is left, gives no number for; the message says why."""


class Clock:
    """The seconds that a part has been given."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
