"""The process that grammars are tried in: a program of its own, which imports nothing of jaxserve.

Some small grammars take minutes to compile, or gigabytes, and nothing tells them from others. What the kernel ends here
is never compiled where it could do harm.

Each line of standard input is a JSON object with a "grammar" in Lark's syntax; the answer is a line with the "seconds"
that it took, or an "error". With "gbnf" it is that grammar in Lark's syntax, as "lark".
"""

import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

_BYTES = 256
_MOST_REAL = 20  # seconds for each of CPU time


class _Vocabulary:
    """Tokens of single bytes, and the model's special ones: grammars may name those. llguidance reads its attributes.

    The model's own would take seconds to load. What a grammar costs hardly depends on them.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, size: int, special: dict[str, int], eos_token_ids: list[int]):
        size = max(size, _BYTES + len(special))
        taken = set(special.values())
        free = [id for id in range(size) if id not in taken]
        self.tokens = [f"<[{id}]>".encode() for id in range(size)]
        for byte, id in enumerate(free[:_BYTES]):
            self.tokens[id] = bytes([byte])
        for name, id in special.items():
            self.tokens[id] = name.encode()
        self.special_token_ids = [*taken, *free[_BYTES:]]
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else self.special_token_ids[-1]
        self._ids = {self.tokens[id]: id for id in free[:_BYTES]}

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._ids[bytes([byte])] for byte in (text.encode() if isinstance(text, str) else text)]


def _answer(tokenizer: LLTokenizer, limits: LLParserLimits, line: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(line)
        if "gbnf" in asked:
            return {"lark": any_to_lark(asked["gbnf"])}
        start = time.process_time()
        matcher = LLMatcher(tokenizer, asked["grammar"], log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some are found to be too large only here
        if matcher.is_error():
            return {"error": matcher.get_error()}
        return {"seconds": time.process_time() - start}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # of the converter, which has none of its own
        return {"error": str(error) or type(error).__name__}


def main(seconds: float, max_bytes: int, vocab_size: int, special: str, eos_token_ids: str, limits: str) -> None:
    vocabulary = _Vocabulary(vocab_size, json.loads(special), json.loads(eos_token_ids))
    tokenizer = LLTokenizer(vocabulary)  # type: ignore[arg-type]
    bounds = LLParserLimits(**json.loads(limits))
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # its data
    resource.setrlimit(resource.RLIMIT_DATA, (held + max_bytes, held + max_bytes))
    for line in sys.stdin.buffer:
        # Either ends the process, wherever it is. Without memory, it may come to wait for itself.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, _MOST_REAL * seconds)
        answer = json.dumps(_answer(tokenizer, bounds, line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
