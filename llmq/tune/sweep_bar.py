"""How far a sweep is, for who watches it: a bar of its windows, and a line for each that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmq.progress import Bar, Progress
from llmq.words import number

if TYPE_CHECKING:
    from llmq.tune.point import Point
    from llmq.tune.sweep import Progress as SweepProgress


@contextmanager
def sweep_progress(
    on_progress: Callable[[SweepProgress], None] | None, *, at_once: bool
) -> Iterator[Callable[[SweepProgress], None]]:
    """What a sweep reports to: `on_progress`, or else a bar of its windows, with a line for each that is measured.

    The bar appears `at_once`, or with the first report.
    """
    if on_progress is not None:
        yield on_progress
        return
    bar = Bar("warming up", rated=False, now=time.monotonic)
    shown = Progress([bar])

    def show(progress: SweepProgress) -> None:
        bar.name = "windows" if progress.level is None else f"measuring {progress.level} at once"
        bar.done, bar.total, bar.in_flight = progress.done, progress.total, progress.level or 0
        if progress.point is not None:
            bar.mark()
            shown.note(f"[{progress.done}/{progress.total}] {point_line(progress.point)}")
        shown.start()
        shown.changed()

    if at_once:
        shown.start()
    try:
        yield show
    except BaseException:
        shown.stop(complete=False)
        raise
    bar.name = "windows"
    shown.stop(complete=True)


def point_line(point: Point) -> str:
    """What a window has brought, on a line."""
    pace = f" ({point.setting.pace})" if point.setting.paced else ""
    p95 = "" if point.service_p95 is None else f", p95 {number(point.service_p95)} s"
    return f"{point.level:>3} at once{pace}: {point.goodput:7.2f} ok/s, 429 {point.share_429:6.1%}{p95}"
