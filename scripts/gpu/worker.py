"""One part in a process of its own: `python -m scripts.gpu.worker PART FD`, the rest of its orders on standard input.

A kernel that touches memory it must not, or never returns, takes its process with it; the supervisor starts the next
one behind the case that did it. What happens goes to file descriptor FD as JSON, one line an event.
"""

import dataclasses
import json
import os
import sys
import traceback
from typing import Any

from scripts.gpu.case import Case, Clock, NotRun
from scripts.gpu.parts import PARTS


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
        done = set(map(tuple, orders["done"]))
        for case in module.cases(clock, orders["ceilings"]):
            key = {"table": case.table.name, "case": case.name}
            if tuple(key.values()) in done:
                continue
            tell(event="begin", limit=case.limit, columns=dataclasses.asdict(case.table), **key)
            tell(**_run(case, clock), **key)


def _run(case: Case, clock: Clock) -> dict[str, Any]:
    if clock.left <= 0:
        return {"event": "not run", "why": "the budget is spent"}
    try:
        return {"event": "row", "row": case.run()}
    except NotRun as reason:
        return {"event": "not run", "why": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"event": "failed", "error": f"{type(error).__name__}: {str(error)[:2000]}"}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
