"""Write README.md's table of families from registry and test cases: `python -m scripts.model_table`."""

import inspect
from pathlib import Path

from jaxserve.models.registry import ARCHITECTURES
from tests.models.cases import CASES

README = Path(__file__).parent.parent / "README.md"
HEADER = ("| family | architecture | its decoder | compared with `transformers` as |", "|---|---|---|---|")


def table() -> list[str]:
    """A line for each architecture: the first sentence of its file, and its cases."""
    rows = []
    for architecture, model in ARCHITECTURES.items():
        sentence = (inspect.getdoc(inspect.getmodule(model)) or "").splitlines()[0].rstrip(".")
        family, _, decoder = sentence.partition(": ")
        cases = ", ".join(case for case, config in CASES.items() if architecture in config["architectures"])
        rows.append(f"| {family} | `{architecture}` | {decoder} | {cases} |")
    return [*HEADER, *sorted(rows)]


def with_table(text: str) -> str:
    """README's `text` with the table of today in the old one's place."""
    lines = text.split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("| family |"))
    end = next(index for index in range(start, len(lines)) if not lines[index].startswith("|"))
    return "\n".join([*lines[:start], *table(), *lines[end:]])


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
