"""Write tests/models/references/. Run it where PyTorch is installed, as `python -m scripts.make_references [case …]`:
for the cases named, or for all, the ropes, and an adapter that PEFT writes.

Each case gets the first seed whose greedy tokens all lead by a clear margin, so that equal tokens are a fair demand.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.models.cases import CASES, write_checkpoint
from tests.models.references import (
    ADAPTED,
    ADAPTER,
    STORED,
    STORED_POSITIONS,
    Reference,
    live_adapter,
    live_reference,
)
from tests.models.ropes import ROPES, live_rope

LEAST_MARGIN = 1e-3


def first_clear_seed(case: str) -> tuple[int, Reference]:
    for seed in range(100):
        with tempfile.TemporaryDirectory() as directory:
            reference, margin = live_reference(case, write_checkpoint(case, Path(directory), seed=seed))
        distinct = len(np.unique(reference.greedy))
        print(f"{case}: seed {seed}, least margin {margin:.1e}, {distinct} distinct tokens generated")
        if margin > LEAST_MARGIN:
            return seed, reference
    raise SystemExit(f"no seed below 100 gives {case} a margin above {LEAST_MARGIN}")


def write_ropes() -> None:
    arrays = {}
    for name in ROPES:
        arrays[name], factor = live_rope(name)
        arrays[f"{name}/factor"] = np.array(factor)
    np.savez_compressed(STORED / "rope.npz", **arrays)


def write_adapter() -> None:
    with tempfile.TemporaryDirectory() as directory:
        logits = live_adapter(write_checkpoint(ADAPTED, Path(directory)), ADAPTER)
    (ADAPTER / "README.md").unlink()  # a form for people to fill in
    np.save(ADAPTER / "logits.npy", logits[STORED_POSITIONS])


def main(cases: list[str]) -> None:
    others = {"rope": write_ropes, "adapter": write_adapter}
    known = (*CASES, *others)
    if unknown := sorted(set(cases) - set(known)):
        raise SystemExit(f"there is no case {unknown[0]}; cases are {', '.join(known)}")
    STORED.mkdir(exist_ok=True)
    for case in cases or known:
        if case in others:
            others[case]()
            continue
        seed, reference = first_clear_seed(case)
        path = STORED / f"{case}.npz"
        logits = reference.logits[STORED_POSITIONS]
        np.savez_compressed(path, seed=np.array(seed), logits=logits, greedy=reference.greedy)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
