"""Text content as APIs send it: a string, or a list of parts that are text."""

from collections.abc import Callable
from typing import Any


def joined_text(*types: str, ignored: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A validator that makes one string of a list of parts of `types`; fields in `ignored` ask for nothing."""
    wanted = " or ".join(map(repr, types))

    def join(content: Any) -> Any:
        if not isinstance(content, list):
            return content  # left to the field's type
        texts = []
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError(f"content has a part without a type; give parts {{'type': {types[0]!r}, 'text': ...}}")
            if part["type"] not in types:
                raise ValueError(
                    f"content parts of type {part['type']!r} are not supported; give parts of type {wanted}"
                )
            if unknown := part.keys() - {"type", "text", *ignored}:
                raise ValueError(f"content has a part with the field {min(unknown)!r}, which is unknown; leave it out")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"content has a part of type {part['type']!r} without a string 'text'; give one")
            texts.append(part["text"])
        return "\n".join(texts)

    return join
