"""A process for work that comes from anyone, with a bound on its time and memory.

There is no telling a long loop from an endless one, and a thread cannot be ended. A process has limits that the kernel
holds.
"""

import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast


class LimitedProcess:
    """Runs `program`, when it is first needed, and again after one that had to end.

    The program's first argument is the seconds of CPU time that it gives each question, the others are `arguments`. It
    answers each line of standard input, a JSON object, with another. For any thread.
    """

    def __init__(self, program: Path, *arguments: str, seconds: float):
        self._command = [sys.executable, "-I", str(program), str(seconds), *arguments]
        self._seconds = seconds
        self._process: subprocess.Popen | None = None
        self._end: Callable[[], object] = lambda: None  # ends the process, once
        self._lock = threading.Lock()  # one question at a time

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The program's answer; with an "error" where the process has ended of the question."""
        line = json.dumps(question).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:  # somebody else has ended it
                self._end()
                self._process = self._start()
            process = self._process
            to_it, from_it = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            try:
                to_it.write(line)
                to_it.flush()
                answered = from_it.readline()
            except BrokenPipeError:
                answered = b""
            if answered.endswith(b"\n"):
                return json.loads(answered)
            self._process = None
            self._end()
        if process.returncode in (-signal.SIGPROF, -signal.SIGALRM):
            return {"error": f"it takes more than {self._seconds:g} seconds"}
        return {"error": "it needs too much memory"}

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what it has to say of a question, it answers
            start_new_session=True,  # so that Ctrl-C is not its business
        )
        self._end = weakref.finalize(self, process.communicate)  # closes its standard input, at whose end it ends
        return process
