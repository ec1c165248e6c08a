"""Command-line flags made from the fields of a settings class, so that a new field needs no second line."""

import argparse
import dataclasses
import inspect
import json
import re
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jaxserve.errors import InputError, nearest

_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `InputError`s. Flags and other arguments may come in any order."""

    def __init__(self, command: str, description: str, *, takes: str = "", examples: Sequence[str]):
        prog = f"jaxserve {command}".strip()
        super().__init__(
            prog=prog,
            usage=" ".join([prog, *takes.split(), "[flags]"]),
            description=description,
            epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments; an unknown flag is an error that names the nearest known one."""
        arguments, unknown = self.parse_known_intermixed_args(words)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                raise InputError(f"there is no flag {flag}{nearest(flag, self._option_string_actions)}")
        if unknown:
            raise InputError(f"there is no place for the argument {unknown[0]!r}; see {self.prog} --help")
        return arguments

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, 110))


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of one settings class; those `left_out` are for the command to decide."""

    title: str
    settings: type
    left_out: frozenset[str] = frozenset()

    def without(self, *names: str) -> "Flags":
        return dataclasses.replace(self, left_out=self.left_out.union(names))

    def only(self, *names: str) -> "Flags":
        return self.without(*{field.name for field in self.fields}.difference(names))

    @property
    def fields(self) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(self.settings) if field.name not in self.left_out]

    def add_to(
        self, parser: argparse.ArgumentParser, *, shown_defaults: Mapping[str, str] = types.MappingProxyType({})
    ) -> Any:
        """Add the group of all flags and return it. `shown_defaults` are those that the command itself decides on."""
        group = parser.add_argument_group(self.title)
        hints, described = get_type_hints(self.settings), _described_attributes(self.settings)
        for field in self.fields:
            help = field.metadata.get("help") or described.get(field.name, "")
            argument = _argument(field.name, hints[field.name])
            if argument["action"] == "append":
                help += "; repeat the flag for several"
            default = shown_defaults.get(field.name, "on" if field.default is True else field.default)
            if default not in (None, ()) and default is not False:
                help += f" (default: {default})"
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                default=argparse.SUPPRESS,  # what is not given stays out, so that a preset can say it
                help=help.replace("%", "%%"),
                **argument,
            )
        return group

    def given(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The settings that the command line names."""
        return {field.name: getattr(arguments, field.name) for field in self.fields if hasattr(arguments, field.name)}

    def field_name(self, spelled: str) -> str:
        """The field of that name, which may be spelled as its flag."""
        name, known = spelled.removeprefix("--").replace("-", "_"), [field.name for field in self.fields]
        if name not in known:
            raise InputError(f"there is no setting {name!r}{nearest(name, known)}")
        return name

    def parse(self, name: str, text: str) -> Any:
        """The value of the field `name` that `text` spells."""
        convert, many = _conversion(get_type_hints(self.settings)[name])
        try:
            return [convert(text)] if many else convert(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{name} cannot be {text!r} ({error})") from error


def _argument(name: str, annotation: Any) -> dict[str, Any]:
    """What argparse is told about a field of this type."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    convert, many = _conversion(annotation)
    metavar = {int: "N", float: "X", str: name.rpartition("_")[2].upper()}.get(convert, "JSON")  # type: ignore[call-overload]
    if many:
        return {"action": "append", "type": convert, "metavar": metavar}
    return {"action": "store", "type": convert, "metavar": metavar}


def _conversion(annotation: Any) -> tuple[Callable[[str], Any], bool]:
    """From text to one value of `annotation`, and whether the field takes several of them."""
    members = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for member in members:
        if get_origin(member) is tuple:
            return get_args(member)[0], True
        if get_origin(member) is dict:
            return _json_object(*get_args(member)), False
    return (_boolean, False) if members[0] is bool else (members[0], False)


def _boolean(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError("say on or off")
    return _WORDS[text.lower()]


def _json_object(key: type, value: type) -> Callable[[str], dict]:
    def convert(text: str) -> dict:
        try:
            return {key(name): value(item) for name, item in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise argparse.ArgumentTypeError(
                f'{text!r} is no JSON object of {key.__name__}s to {value.__name__}s, such as {{"7": 1}}'
            ) from error

    return convert


def _described_attributes(settings: type) -> dict[str, str]:
    """What the docstring's `Attributes:` section says of each."""
    section = (inspect.getdoc(settings) or "").partition("Attributes:\n")[2]
    return dict(re.findall(r"^ {4}(\w+): (.+?)\.?$", section, re.MULTILINE))
