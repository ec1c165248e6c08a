"""The flags that commands share, and the engine that they ask for."""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxserve
from jaxserve.cli.flags import Flags
from jaxserve.config import EngineConfig, read_preset
from jaxserve.errors import InputError
from jaxserve.progress import ProgressBars
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

ENGINE = Flags("engine", EngineConfig)
# The engine's --seed makes a whole run repeatable, so requests need none of their own.
SAMPLING = Flags("sampling (what is left out, the model's generation_config.json says)", SamplingParams).without(
    *("seed", "structured_outputs", "thinking", "chat_grammar", "pooling")
)

TEXT_ENGINE = ENGINE.without("skip_tokenizer_init")
# Token ids in, token ids out; and the memory's bandwidth is measured before, which several processes cannot.
BENCH_ENGINE = TEXT_ENGINE.without("tokenizer", "coordinator_address", "num_processes", "process_id")

PRESETS = Path(jaxserve.__file__).parent.parent / "configs"  # in a checkout


def add_engine_flags(parser: argparse.ArgumentParser, flags: Flags = ENGINE) -> None:
    """`--config` and a flag for each engine setting."""
    group = flags.add_to(parser)
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of these settings; flags win over it. In a checkout, a name in configs/ will do",
    )


def add_adapter_flag(parser: Any) -> None:
    parser.add_argument("--adapter", metavar="NAME", help="answer with this one of --lora-modules")


def check_adapter(name: str | None, config: EngineConfig) -> None:
    """`InputError` if there is no adapter of that name."""
    if name is not None and name not in config.adapters:
        known = f"there are {', '.join(config.adapters)}" if config.adapters else "--lora-modules gives none"
        raise InputError(f"there is no adapter {name!r}; {known}")


def engine_config(arguments: argparse.Namespace, flags: Flags = ENGINE) -> EngineConfig:
    """The settings of the engine, of which `flags` may be only some."""
    (config,) = read_settings(arguments, flags)
    return config


def read_settings(arguments: argparse.Namespace, *groups: Flags) -> list[Any]:
    """Each group's settings: flags win over the preset, and the preset over the defaults."""
    preset = read_preset(_find_preset(arguments.config)) if arguments.config else {}
    others = groups[1:]  # what no group knows is for the first to refuse
    theirs = {field.name for group in others for field in group.fields}
    given = [{name: value for name, value in preset.items() if name not in theirs}]
    given += [{field.name: preset[field.name] for field in group.fields if field.name in preset} for group in others]
    return [
        group.settings.from_settings(settings | group.given(arguments))  # type: ignore[attr-defined]
        for group, settings in zip(groups, given, strict=True)
    ]


def start_llm(config: EngineConfig) -> "LLM":
    """Load and compile, with progress bars on a terminal."""
    from jaxserve.llm import LLM  # on demand: it brings JAX with it

    return LLM(**dataclasses.asdict(config), progress=sys.stderr.isatty())


def follow(config: EngineConfig) -> None:
    """Do the steps of the first of several processes, until it ends."""
    from jaxserve.engine.follower import follow  # on demand: they bring JAX with them
    from jaxserve.engine.startup import load

    # Who ends a job signals all its processes; this one is needed until the first has finished what it was asked.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first = f"process 0 at {config.coordinator_address}"
    print(f"Process {config.process_id} of {config.num_processes} works for {first}", file=sys.stderr, flush=True)
    with ProgressBars() as bars:
        loaded = load(config, bars)
    follow(loaded)


def _find_preset(name: str) -> str:
    """A path as it is, or the file of a preset's bare name."""
    if Path(name).exists():
        return name
    presets = {path.stem: str(path) for path in sorted(PRESETS.glob("*.yaml"))}
    if name in presets:
        return presets[name]
    known = f"; the presets here are {', '.join(presets)}" if presets else ""
    raise InputError(f"there is no file {name}{known}")
