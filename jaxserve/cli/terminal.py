"""What a model wrote, made safe to show: a terminal acts on control characters, and a model may write any."""

_SHOWN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_DROPPED = dict.fromkeys(range(0x80, 0xA0))


def printable(text: str) -> str:
    """`text` with Unicode's pictures of control characters in their place; tabs and line breaks stay."""
    return text.translate(_SHOWN | _DROPPED)
