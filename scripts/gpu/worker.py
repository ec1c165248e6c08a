"""One part in a process of its own: `python -m scripts.gpu.worker PART FD`, the rest of its orders on standard input.

A kernel that never returns is killed with its process, and one that touches memory it must not leaves its process a
device of no use, so that it ends itself; the supervisor starts the next one behind the case that did it. What happens
goes to file descriptor FD as JSON, one line an event.
"""

import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from scripts.gpu.case import Case, Clock, NotRun
from scripts.gpu.parts import PARTS

_LOST_DEVICE = 70  # the exit status of a process whose device is of no more use to it


def main(name: str, descriptor: int) -> None:
    orders = json.load(sys.stdin)
    with os.fdopen(descriptor, "w", buffering=1) as report:

        def tell(**event: Any) -> None:
            print(json.dumps(event), file=report)

        module = PARTS[name].load()
        facts = module.facts()
        tell(event="facts", facts=facts)
        if orders["device"] == "gpu" and facts.get("platform") == "cpu":
            tell(event="failed", error="JAX sees no GPU here; --device cpu runs everything at toy size")
            return
        clock = Clock(orders["seconds"])
        done, hung = (set(map(tuple, orders[which])) for which in ("done", "hung"))
        for case in module.cases(clock, orders["ceilings"], Path(orders["folder"])):
            key = {"table": case.table.name, "case": case.name}
            if tuple(key.values()) in done:
                continue
            tell(event="begin", limit=case.limit, kernel=case.kernel, columns=dataclasses.asdict(case.table), **key)
            tell(**_run(case, clock, hung), **key)


def _run(case: Case, clock: Clock, hung: set[tuple[str, str]]) -> dict[str, Any]:
    if clock.left <= 0:
        return {"event": "not run", "why": "the budget is spent"}
    if case.kernel and (case.table.name, case.kernel) in hung:
        return {"event": "not run", "why": f"{case.kernel} hung in a case before"}
    try:
        return {"event": "row", "row": case.run()}
    except NotRun as reason:
        return {"event": "not run", "why": str(reason)}
    except Exception as error:
        traceback.print_exc()
        _end_without_device()
        return {"event": "failed", "error": f"{type(error).__name__}: {str(error)[:2000]}"}


def _end_without_device() -> None:
    """End here if the device computes no more: after an illegal access it refuses whatever this process asks for."""
    jax = sys.modules.get("jax")
    if jax is None:  # PyTorch's part
        return
    try:
        jax.block_until_ready(jax.numpy.zeros(8) + 1)
    except jax.errors.JaxRuntimeError:
        traceback.print_exc()
        os._exit(_LOST_DEVICE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
