"""What the text of a completion has to be, with the names that vLLM's users know."""

import dataclasses
import json
from typing import Any

from jaxserve.errors import InputError, Name, nearest

MAX_CHARACTERS = 2**18  # of a schema, a regular expression, a grammar, or all choices together
_FORMS = ("json", "json_object", "regex", "choice", "grammar")


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """One of the forms below; `InputError` for none, for several, or for one that is too large or of another type.

    Attributes:
        json: a JSON schema, as a dict or as text; the completion is a JSON value that it allows. Between its parts
            stand up to 32 blanks, unless the white space settings say otherwise.
        json_object: True for any JSON object.
        regex: a regular expression in Rust's syntax (no look-around, no back-references) that matches all of it.
        choice: texts, of which it is one.
        grammar: a context-free grammar, in Lark's syntax as llguidance takes it, or in GBNF.
        disable_any_whitespace: JSON without spaces and line breaks between its parts.
        whitespace_pattern: a regular expression of the white space between the parts of JSON.
        given_as: the field that they were given in, if it had another name; errors tell it.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    given_as: str | None = dataclasses.field(default=None, compare=False)

    def __init__(self, **settings: Any):
        fields = {field.name: field.default for field in dataclasses.fields(type(self))}
        for name in settings:
            if name not in fields:
                raise InputError(f"structured_outputs has no field {name!r}{nearest(name, fields)}", field=name)
        for name, default in fields.items():
            object.__setattr__(self, name, settings.get(name, default))
        self._normalise()
        self._check()

    def _normalise(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        if isinstance(self.json, dict | bool):
            try:
                object.__setattr__(self, "json", json.dumps(self.json))
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    Name("json"), f" holds what JSON cannot express ({error}); give plain values"
                ) from error
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)

    @property
    def form(self) -> str:
        """Which of the forms it is."""
        return next(name for name in _FORMS if getattr(self, name) is not None)

    @property
    def name(self) -> str:
        """What its user knows it as."""
        return self.given_as or self.form

    def _check(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                Name("structured_outputs"),
                f" has {' and '.join(given) or 'no form'}; give one of {', '.join(_FORMS)}",
            )
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), str | None):
                kind = type(getattr(self, name)).__name__
                raise InputError(
                    Name(name), f" is a {kind}; give {'a schema or its text' if name == 'json' else 'a text'}"
                )
        if self.json_object is not None and self.json_object is not True:
            raise InputError(Name("json_object"), f" is {self.json_object!r}; give true or leave it out")
        if not isinstance(self.disable_any_whitespace, bool):
            raise InputError(Name("disable_any_whitespace"), f" is {self.disable_any_whitespace!r}; give true or false")
        if self.choice is not None and (
            not isinstance(self.choice, tuple)
            or not self.choice
            or not all(isinstance(text, str) and text for text in self.choice)
        ):
            raise InputError(Name("choice"), " is no list of non-empty texts; give one with at least one text")
        if (self.disable_any_whitespace or self.whitespace_pattern) and self.form not in ("json", "json_object"):
            raise InputError(
                f"white space is for JSON to set, and structured_outputs has {self.form}; leave it out",
                field="structured_outputs",
            )
        self._check_text()

    def _check_text(self) -> None:
        content = getattr(self, self.form)
        texts = content if isinstance(content, tuple) else [content] if isinstance(content, str) else []
        size = sum(map(len, texts))
        if size > MAX_CHARACTERS:
            raise InputError(
                Name(self.form), f" has {size} characters and at most {MAX_CHARACTERS} are possible; shorten it"
            )
        if not all(map(is_unicode, [*texts, self.whitespace_pattern or ""])):
            raise InputError(Name(self.form), " holds half a surrogate pair, which is no character; leave it out")


def is_unicode(text: str) -> bool:
    """Whether it holds characters only, and no halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
