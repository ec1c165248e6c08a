"""The functions that an answer may call, and which of them it has to."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import InputError, Name

Choice = str | Mapping[str, Any]  # in OpenAI's forms
_PARAMETERS = Name("function.parameters")
_FORMS = (
    "'none', 'auto', 'required', {'type': 'function', 'function': {'name': ...}} or "
    "{'type': 'allowed_tools', 'allowed_tools': {'mode': ..., 'tools': [...]}}"
)


@dataclasses.dataclass(frozen=True)
class Function:
    """One of them: `parameters` is the JSON schema of its arguments, which follow all of it if it is `strict`."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a request says of tools.

    Attributes:
        shown: the tools as it gives them, which the chat template shows the model.
        callable: those functions among them that may be called.
        required: whether one has to be.
        named: whether it was asked for by its name, and is called once.
        parallel: whether there may be several calls.
    """

    shown: tuple[dict[str, Any], ...] = ()
    callable: tuple[Function, ...] = ()
    required: bool = False
    named: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, given: Sequence[Any] | None, choice: Choice | None = None, *, parallel: bool = True) -> "Tools":
        """Read tools and `tool_choice` in OpenAI's form; `InputError` says what is wrong with them.

        The model does not see what is not to be called at all, nor which functions are strict.
        """
        if not isinstance(given, Sequence | None):
            raise InputError(Name("tools"), f" is of type {type(given).__name__}; give a list of them")
        functions = [_function(tool, number) for number, tool in enumerate(given or ())]
        mode, names = _mode(choice, {function.name for function in functions})
        if mode == "required" and not functions:
            raise _wrong_choice("asks for a call and there are no tools; give some")
        if mode == "none" or not given:
            return cls()
        return cls(
            tuple(_shown(tool) for tool in given),
            tuple(function for function in functions if names is None or function.name in names),
            required=mode != "auto",
            named=mode == "named",
            parallel=parallel and mode != "named",
        )

    @property
    def restrained(self) -> bool:
        """Whether the model may not call them as it likes, so that a grammar has to see to it."""
        return (
            self.required or len(self.callable) < len(self.shown) or any(function.strict for function in self.callable)
        )


def _function(tool: Any, number: int) -> Function:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = repr(tool.get("type")) if isinstance(tool, dict) else type(tool).__name__
        raise _wrong_tool(number, f" is of type {kind}; only functions are supported")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _wrong_tool(
            number,
            " is no function with a name; give {'type': 'function', 'function': {'name': ..., 'parameters': ...}}",
        )
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(parameters, dict | None):
        kind = type(parameters).__name__
        raise _wrong_tool(number, ".", _PARAMETERS, f" is a {kind}; give a JSON schema, which is an object")
    if not isinstance(strict, bool | None):
        raise _wrong_tool(number, f".function.strict is {strict!r}; give true or false")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    kinds = parameters.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise _wrong_tool(number, ".", _PARAMETERS, f" is of type {kinds!r}; arguments are of type 'object'")
    return Function(function["name"], {**parameters, "type": "object"}, bool(strict))


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"function": {name: value for name, value in tool["function"].items() if name != "strict"}}


def _mode(choice: Choice | None, known: set[str]) -> tuple[str, set[str] | None]:
    """none, auto, required or named, and the names of the tools that may be called, if not all may."""
    match choice:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return choice, None
        case {"type": "function", "function": {"name": str(name), **more}, **others} if not (more or others):
            return "named", _known([name], known)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools], **more},
            **others,
        } if not (more or others):
            names = [_allowed_name(tool) for tool in tools]
            if not names:
                raise _wrong_choice("allows no tool; name one, or give 'none'")
            return mode, _known(names, known)
    shown = repr(choice)
    raise _wrong_choice(f"is {shown if len(shown) <= 60 else shown[:60] + '...'}; give {_FORMS}")


def _allowed_name(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise _wrong_choice("allows what is no function with a name; give {'type': 'function', 'function': {'name': ...}}")


def _known(names: list[str], known: set[str]) -> set[str]:
    for name in names:
        if name not in known:
            raise _wrong_choice(f"names {name!r}, which is not among the tools")
    return set(names)


def _wrong_tool(number: int, *told: str | Name) -> InputError:
    return InputError(Name("tools"), f"[{number}]", *told)


def _wrong_choice(told: str) -> InputError:
    return InputError(Name("tool_choice"), f" {told}")
