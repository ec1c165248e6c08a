"""The house rules that no tool knows: who may import whom, what lies at the top level, how long a file may get."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jaxserve", "pallas_kernels")

# From top to bottom: a module imports from its own unit and from the units below it, never from one above.
ORDER = (
    "jaxserve.cli",
    "jaxserve.server",
    "jaxserve",  # __init__.py: the names that users import
    "jaxserve.llm",
    "jaxserve.engine",
    "jaxserve.runner",
    "jaxserve.checkpoint",
    "jaxserve.config",
    "jaxserve.models",
    "jaxserve.layers",
    "jaxserve.parallel",
    "jaxserve.chat",
    "jaxserve.outputs",
    "jaxserve.stats",
    "jaxserve.sampling_params",
    "jaxserve.lark",
    "jaxserve.structured_outputs",
    "jaxserve.limited_process",
    "jaxserve.progress",
    "jaxserve.errors",
    "pallas_kernels",
)

WITHOUT_JAX = (
    "jaxserve.server",
    "jaxserve.chat",
    "jaxserve.outputs",
    "jaxserve.stats",
    "jaxserve.sampling_params",
    "jaxserve.config",  # this and the next two are what the server shares with its engine's process
    "jaxserve.checkpoint.tokenizer",
    "jaxserve.engine.input_processor",
    "jaxserve.engine.scheduler",
    "jaxserve.engine.page_pool",
    "jaxserve.engine.request",
    "jaxserve.runner.step_batch",  # the contract between scheduling and JAX: plain records
)
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

TOP_LEVEL = {
    *("jaxserve", "pallas_kernels", "configs", "tests", "scripts"),
    *("pyproject.toml", "requirements.lock", "README.md", "LICENSE"),
}

MAX_LINES = 500


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def within(module: str, unit: str) -> bool:
    return module == unit or module.startswith(f"{unit}.")


def unit_of(module: str) -> str:
    """The entry of `ORDER` that `module` belongs to."""
    first, *rest = module.split(".")
    unit = first if first == "pallas_kernels" else ".".join([first, *rest[:1]])
    if unit not in ORDER:
        raise LookupError(f"{unit} has no place in ORDER of {__file__}: say there what it may import")
    return unit


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that `module` imports, at its top or inside a function."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import name`: name is a module of ours, or something that the package holds
                name = f"{source}.{alias.name}"
                yield node.lineno, name if name in MODULES else source


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(WITHOUT_JAX) <= MODULES.keys()
    for module in MODULES:
        unit_of(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_downwards(module: str) -> None:
    place = ORDER.index(unit_of(module))
    upwards = [
        f"line {line}: {imported}"
        for line, imported in imports(module)
        if within(imported, "jaxserve") or within(imported, "pallas_kernels")
        if ORDER.index(unit_of(imported)) < place
    ]
    assert not upwards, f"{module} imports from above"


@pytest.mark.parametrize("module", [m for m in MODULES if any(within(m, unit) for unit in WITHOUT_JAX)])
def test_what_knows_nothing_of_jax_imports_none(module: str) -> None:
    assert not [f"line {line}: {name}" for line, name in imports(module) if name.partition(".")[0] in JAX]


def test_top_level_holds_nothing_else() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    names = {path.partition("/")[0] for path in listing.stdout.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("module", MODULES)
def test_a_file_fits_in_the_head(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{MODULES[module]} has {lines} lines: split it by what changes together"
