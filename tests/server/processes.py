"""`jaxserve serve` as a user starts it: two processes, of which tests end one."""

import dataclasses
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Few and small programs, which are in the cache after the first start.
ENGINE = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 2048, "page_size": 16}


@dataclasses.dataclass
class Served:
    """A running server."""

    process: subprocess.Popen
    address: str
    log: Path

    @property
    def core(self) -> int:
        """The process id of its engine."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    @property
    def stderr(self) -> str:
        return self.log.read_text()


@contextmanager
def served(*flags: str, **settings: object) -> Iterator[Served]:
    """A server on the demo model that has said that it is ready."""
    words = [
        word for name, value in (ENGINE | settings).items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "jaxserve.cli.main", "serve", "--port", "0", *words, *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with log.open("w") as errors:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout
            found = re.fullmatch(r"Serving demo_model on (https?://127.0.0.1:\d+)\n", process.stdout.readline())
            assert found, log.read_text()
            yield Served(process, found[1], log)
        finally:
            process.kill()
            process.wait()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet fetched by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
