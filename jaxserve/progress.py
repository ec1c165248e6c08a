"""Progress bars on standard error."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

_IN_BYTES = {"weights"}  # stages whose progress is told in bytes


class _DoneColumn(ProgressColumn):
    """`3/16`, or gigabytes with their rate."""

    def render(self, task: Task) -> Text:
        total = task.total or 0
        if task.description not in _IN_BYTES:
            return Text(f"{task.completed:.0f}/{total:.0f}", style="progress.download")
        rate = task.completed / task.elapsed / 1e9 if task.elapsed else 0
        return Text(f"{task.completed / 1e9:.2f}/{total / 1e9:.2f} GB, {rate:.2f} GB/s", style="progress.download")


class ProgressBars:
    """A bar for each stage of long work; call it with a stage, how much is done and how much there is."""

    def __init__(self, *, enabled: bool = True):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            _DoneColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)

    def __enter__(self) -> "ProgressBars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
