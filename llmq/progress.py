"""How far a run is, a bar a stage: for `LLMQueue.map`, `Pipeline.run`, `llmq.sweep` and the command line.

Whoever works counts, in a `Bar`; where the bars are shown is found out once, at the start of the run:

- in a terminal, on stderr: rich's own thread looks at the counts four times a second;
- in a notebook: one display of HTML, updated as things happen, at most five times a second. It is no widget, so the
  last state is saved with the notebook;
- elsewhere: lines on stderr as things happen, at most one in five seconds, and one at the end.

No task is started, so nothing outlives the run; however it ends, its last state is shown. Rates go by the clock of the
run's loop, so that they hold in virtual time, too.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llmq.waiters import clock, is_own_cancellation
from llmq.words import number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

R = TypeVar("R")

LOOKS_PER_SECOND = 4
NOTEBOOK_SECONDS = 0.2
LINE_SECONDS = 5.0
_RATE_SECONDS = 30


@dataclass
class Bar:
    """The counts of one stage. `total` None: not known. `skipped`: not reached, since an earlier stage failed.

    `in_flight` counts attempts under way: one that waits to be tried again is not in flight.
    """

    name: str
    total: int | None = None
    done: int = 0
    failed: int = 0
    skipped: int = 0
    in_flight: int = 0
    rated: bool = True
    stopped: bool = False
    now: Callable[[], float] = clock
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATE_SECONDS + 1), repr=False)
    _newest: tuple[float, int] = (0.0, 0)

    @property
    def ended(self) -> int:
        """How many are through, whatever became of them."""
        return self.done + self.failed + self.skipped

    def mark(self) -> None:
        """Note the time for the rate, after a count has changed."""
        self._newest = (self.now(), self.ended)
        if not self._marks or self._newest[0] - self._marks[-1][0] >= 1.0:
            self._marks.append(self._newest)

    def rate(self) -> float | None:
        """How many end a second, over about the last half minute; None as long as that says nothing."""
        if not self._marks:
            return None
        (began_at, before), (at, ended) = self._marks[0], self._newest
        return (ended - before) / (at - began_at) if at > began_at and ended > before else None

    def seconds_left(self) -> float | None:
        """Until the total, at this rate; None where either is not known."""
        rate = self.rate()
        return None if rate is None or self.total is None else max(0, self.total - self.ended) / rate

    async def attempt(self, awaitable: Awaitable[R]) -> R:
        """Await it, in flight meanwhile."""
        self.in_flight += 1
        try:
            return await awaitable
        finally:
            self.in_flight -= 1

    def figures(self) -> tuple[str, ...]:
        """How many of how many; failed; in flight; rate; time left. Empty where there is nothing to say.

        Of a bar that has stopped nothing is in flight, and no time is left.
        """
        rate, left = self.rate(), self.seconds_left()
        unfinished = not self.stopped and (self.total is None or self.ended < self.total)
        return (
            f"{self.ended}" if self.total is None else f"{self.ended}/{self.total}",
            ", ".join(f"{n} {what}" for n, what in ((self.failed, "failed"), (self.skipped, "not reached")) if n),
            f"{self.in_flight} in flight" if self.in_flight and not self.stopped else "",
            _rate(rate) if rate is not None and self.rated else "",
            f"{_minutes(left)} left" if left is not None and unfinished else "",
        )


def _rate(per_second: float) -> str:
    return f"{number(per_second)}/s" if per_second >= 1 else f"{number(60 * per_second)}/min"


def _minutes(seconds: float) -> str:
    whole = math.ceil(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )


def size_of(items: object) -> int | None:
    """How many items there are, where they say so without being read."""
    return len(items) if isinstance(items, Sized) else None


class Progress:
    """Bars, shown from `start` to `stop`; also a context manager."""

    def __init__(self, bars: Iterable[Bar]) -> None:
        self.bars = {bar.name: bar for bar in bars}
        self.status = ""
        self._view: _View | None = None

    def start(self) -> None:
        """Show the bars from now on; a second time does nothing."""
        if self._view is None:
            for bar in self.bars.values():
                bar.mark()
            self._view = _new_view(self)

    def changed(self) -> None:
        """Something has been counted."""
        if self._view is not None:
            self._view.changed()

    def note(self, line: str) -> None:
        """A line to keep, above the bars."""
        self.start()
        if self._view is not None:
            self._view.note(line)

    def stop(self, *, complete: bool) -> None:
        """Show the last state, and no more. Not `complete`: it says so."""
        view, self._view = self._view, None
        if view is not None:
            self.status = "" if complete else "stopped"
            for bar in self.bars.values():
                bar.stopped = True
            view.stop()

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(complete=exc is None)

    @contextmanager
    def counted(self, bar: Bar) -> Iterator[None]:
        """Count what is done within as done or failed; as neither where it is cancelled from outside."""
        try:
            yield
        except BaseException as error:
            if not _from_outside(error):
                bar.failed += 1
                self._ended(bar)
            raise
        bar.done += 1
        self._ended(bar)

    def skip(self, bar: Bar) -> None:
        """Count one that will not be reached."""
        bar.skipped += 1
        self._ended(bar)

    def _ended(self, bar: Bar) -> None:
        bar.mark()
        self.changed()

    def line(self) -> str:
        """All bars on a line."""
        parts = (f"{bar.name} {', '.join(filter(None, bar.figures()))}" for bar in self.bars.values())
        return "; ".join([*parts, *([self.status] if self.status else [])])


class ItemProgress:
    """One item on its way through the stages of a pipeline: a context manager around it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._left = dict(progress.bars)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a stage with all its attempts."""
        with self._progress.counted(self._progress.bars[name]):
            try:
                yield
            except BaseException as error:
                if not _from_outside(error):
                    del self._left[name]
                raise
            del self._left[name]

    def attempt(self, name: str, call: Callable[[], Awaitable[R]]) -> Callable[[], Awaitable[R]]:
        """The call, in flight while it runs."""
        bar = self._progress.bars[name]
        return lambda: bar.attempt(call())

    def __enter__(self) -> ItemProgress:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None and not _from_outside(exc):
            for bar in self._left.values():
                self._progress.skip(bar)


def _from_outside(error: BaseException) -> bool:
    """Whether the run is being ended, which is no failure of the item."""
    return not isinstance(error, (Exception, asyncio.CancelledError)) or is_own_cancellation(error)


class _View(Protocol):
    def changed(self) -> None: ...
    def note(self, line: str) -> None: ...
    def stop(self) -> None: ...


def _new_view(progress: Progress) -> _View:
    if in_notebook():
        return _InNotebook(progress)
    console = new_console()
    return _InTerminal(progress, console) if console.is_terminal else _Lines(progress, console)


def new_console() -> Console:
    """Where bars and lines go that are in no notebook."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, force_jupyter=False)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. Imports nothing."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class _InTerminal:
    """rich draws, in a thread of its own; what is printed meanwhile appears above."""

    def __init__(self, progress: Progress, console: Console) -> None:
        from rich.live import Live

        self._progress = progress
        self._live = Live(
            console=console,
            get_renderable=self._drawn,
            refresh_per_second=LOOKS_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()

    def changed(self) -> None:
        """The thread looks by itself."""

    def note(self, line: str) -> None:
        self._live.console.print(line)

    def stop(self) -> None:
        self._live.stop()  # draws once more

    def _drawn(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for bar in self._progress.bars.values():
            drawn = ProgressBar(total=bar.total, completed=bar.ended, width=24, pulse=False)
            cells = [*bar.figures(), self._progress.status]
            grid.add_row(Text(bar.name), drawn if bar.total else Text(""), *map(Text, cells))
        return grid


class _InNotebook:
    """One display, found again by its id."""

    def __init__(self, progress: Progress) -> None:
        from IPython.display import display

        self._progress = progress
        self._notes: list[str] = []
        self._id = uuid.uuid4().hex
        self._drawn_at = time.monotonic()
        display(self._bundle(), raw=True, display_id=self._id)  # type: ignore[no-untyped-call]

    def changed(self) -> None:
        if time.monotonic() - self._drawn_at >= NOTEBOOK_SECONDS:
            self._draw()

    def note(self, line: str) -> None:
        self._notes.append(line)
        self.changed()

    def stop(self) -> None:
        self._draw()

    def _draw(self) -> None:
        from IPython.display import update_display

        self._drawn_at = time.monotonic()
        update_display(self._bundle(), raw=True, display_id=self._id)  # type: ignore[no-untyped-call]

    def _bundle(self) -> dict[str, str]:
        return {
            "text/html": bars_html(list(self._progress.bars.values()), self._progress.status, self._notes),
            "text/plain": "\n".join([*self._notes, self._progress.line()]),
        }


def bars_html(bars: Sequence[Bar], status: str = "", notes: Sequence[str] = ()) -> str:
    """The bars as HTML without script or style sheet."""
    rows = []
    for bar in bars:
        drawn = f'<progress value="{bar.ended}" max="{bar.total}"></progress>' if bar.total else ""
        cells = (escape(bar.name), drawn, *map(escape, bar.figures()), escape(status))
        rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
    lines = f"<pre>{escape(chr(10).join(notes))}</pre>" if notes else ""
    return f"{lines}<table>{''.join(rows)}</table>"


class _Lines:
    """For logs. A note is a line at once, the bars now and then, and at the end if anything has ended."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._printed = ""
        self._printed_at = time.monotonic()

    def changed(self) -> None:
        if time.monotonic() - self._printed_at >= LINE_SECONDS:
            self.note(self._progress.line())

    def note(self, line: str) -> None:
        self._printed, self._printed_at = line, time.monotonic()
        self._console.print(line, soft_wrap=True)

    def stop(self) -> None:
        if any(bar.ended for bar in self._progress.bars.values()) and self._progress.line() != self._printed:
            self.note(self._progress.line())
