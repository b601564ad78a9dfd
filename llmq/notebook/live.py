"""The live panel: watch a queue, and steer it, while a pipeline runs.

- A daemon thread of its own reads the queue and sets the widgets' values, so the panel lives on where a cell blocks its
  loop, and after the loop has ended. ipykernel sends the messages of all threads from one, so this is safe.
- What has not changed is not sent: traitlets compares. The thread takes at most a twentieth of the time: the longer a
  look at the queue takes, the longer it waits until the next.
- The reader's hand and the panel's thread may both move the slider, so both take the panel's lock. The thread moves it
  only where the queue's limit has changed since it was last shown, and its own moves are not taken for the reader's.
- ipykernel 7.4 delivers clicks while a cell awaits, and those made while a cell blocks when it has ended (measured).
  Older kernels deliver all of them when the cell has ended; there, start the pipeline with `asyncio.create_task` and
  let the cell end. With subshells, clicks may come in any thread.
- The queue is held weakly. The panel and its thread end with `close()`, a later panel of the same queue, the last
  call of a closed queue, or the collection of the queue.
- An open panel is displayed as a widget together with a static table. At its end the display is replaced by that table
  with the last figures, so that a saved notebook shows these and needs no widget state.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from llmq.errors import ConfigError, LLMQError
from llmq.notebook.rolling import Figures, Reader
from llmq.notebook.views import figures_html, lines_html, stages_html, static_html, static_text
from llmq.pages import html_text
from llmq.queue import LLMQueue
from llmq.runtime import active_queue

UPDATES_PER_SECOND = 5
MOST_UPDATES_PER_SECOND = 10
BUSY_SHARE = 20
"""After a look at the queue the thread rests at least so many times as long as that took."""
LEAST_SLIDER_MAX = 64

NO_QUEUE = (
    "There is no queue to show: the flag is off, so calls go straight to the provider. Set llm_queue_enabled: true "
    "(SA_LLM_QUEUE_ENABLED=true), or show a queue of your own: panel(queue)."
)
NO_WIDGETS = "These are the figures of one moment. For a live panel: pip install 'llmq-toolkit[notebook]'"
NO_NOTEBOOK = (
    "These are the figures of one moment. A live panel needs a Jupyter notebook; what it needs is in "
    "pip install 'llmq-toolkit[notebook]'"
)
AS_DRAWN = "These are the figures of the moment when this was drawn; run the cell for a live panel."
LAST = "The panel is closed; these are its last figures."


def panel(queue: LLMQueue | None = None, *, updates_per_second: float = UPDATES_PER_SECOND) -> Panel | StaticPanel:
    """A live panel of a queue, by default the one in force; shown where it is the last expression of a cell.

    It shows what is in flight and waits, the limit, goodput (successful calls/s), the share of 429s by limit, p50 and
    p95 of wait and service in seconds, tokens a minute, why the oldest waiter waits, and the stages. A slider sets the
    concurrency, buttons pause, resume, drain, and cancel who waits. Goodput is of the last 10 s, shares, times and
    tokens are of the last minute, stages of all calls since the panel was made.

    Updates come from a thread of its own until `close()`, or until the queue is closed or collected. A later panel of
    the same queue closes the earlier one. Before you save a notebook, `close()` it in the last cell: its last figures
    stay as a table.

    With the flag off, without ipywidgets, or outside a notebook, it is a table of one moment's figures that says why.
    Raises ConfigError for `updates_per_second` that are not above 0 and at most 10, and for what is no queue.
    """
    if not isinstance(updates_per_second, (int, float)) or not 0 < updates_per_second <= MOST_UPDATES_PER_SECOND:
        raise ConfigError(
            f"updates_per_second must be above 0 and at most {MOST_UPDATES_PER_SECOND}, got {updates_per_second!r}"
        )
    if queue is not None and not isinstance(queue, LLMQueue):
        raise ConfigError(f"panel() shows an LLMQueue, or without one the queue in force; got {queue!r}")
    queue = active_queue() if queue is None else queue
    if queue is None:
        return StaticPanel(None, NO_QUEUE)
    if not _has_widgets():
        return StaticPanel(Reader().read(queue), NO_WIDGETS)
    if not _in_notebook():
        return StaticPanel(Reader().read(queue), NO_NOTEBOOK)
    found = Panel(queue)
    found.start(updates_per_second)
    return found


@dataclass(frozen=True)
class StaticPanel:
    """Figures of one moment, with a note on why they are not live. `figures` is None where there is no queue."""

    figures: Figures | None
    note: str

    def close(self) -> None:
        """Nothing: there is nothing to end."""

    def _repr_html_(self) -> str:
        return static_html(self.figures, self.note)

    def __repr__(self) -> str:
        return static_text(self.figures, self.note)


class Panel:
    """A live panel; made by `panel`. Needs ipywidgets."""

    _of_queue: ClassVar[weakref.WeakKeyDictionary[LLMQueue, Panel]] = weakref.WeakKeyDictionary()

    def __init__(self, queue: LLMQueue) -> None:
        import ipywidgets

        earlier = self._of_queue.get(queue)
        if earlier is not None:
            earlier.close()
        self._of_queue[queue] = self
        self._queue = weakref.ref(queue)
        self._reader = Reader()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._drainer: threading.Thread | None = None
        self._display_id = uuid.uuid4().hex
        self._is_displayed = self._is_closed = self._is_syncing = False
        self._shown_limit = 0
        self._message = ""
        self._figures = self._reader.read(queue)
        self._slider = ipywidgets.IntSlider(
            value=1, min=1, max=LEAST_SLIDER_MAX, description="at once", layout={"width": "30em"}
        )
        self._buttons = {name: ipywidgets.Button(description=name) for name in ("pause", "resume", "drain", "cancel")}
        self._numbers, self._lines, self._words, self._stages = (ipywidgets.HTML() for _ in range(4))
        row = ipywidgets.HBox([self._slider, *self._buttons.values()], layout={"flex_flow": "row wrap"})
        self._box = ipywidgets.VBox([row, self._numbers, self._lines, self._words, self._stages])
        self._box.add_class("llmq-panel")
        self._show(self._figures)
        self._slider.observe(self._slider_moved, "value")
        for name, press in self._presses().items():
            self._buttons[name].on_click(lambda _button, press=press: self._press(press))

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self._is_closed

    def start(self, updates_per_second: float) -> None:
        """Update from a daemon thread from now on."""
        self._thread = threading.Thread(
            target=self._run, args=(1 / updates_per_second,), name="llmq-panel", daemon=True
        )
        self._thread.start()

    def tick(self) -> None:
        """Read the queue once, and set what has changed. The panel's thread calls it."""
        with self._lock:
            if self._is_closed:
                return
            queue = self._queue()
            if queue is None:
                self._end()
                return
            self._figures = self._reader.read(queue)
            self._show(self._figures)
            if self._figures.state == "closed" and not self._figures.in_flight:
                self._end()

    def close(self) -> None:
        """End the thread, and leave the last figures as a table. More than once does no harm."""
        if (queue := self._queue()) is not None and not self._is_closed:
            with self._lock:
                self._figures = self._reader.read(queue)
        with self._lock:
            self._end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, seconds: float) -> None:
        took = 0.0
        while not self._stop.wait(max(seconds, BUSY_SHARE * took)):
            began = time.perf_counter()
            self.tick()
            took = time.perf_counter() - began

    def _end(self) -> None:
        """Under the lock."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop.set()
        queue = self._queue()
        if queue is not None and self._of_queue.get(queue) is self:
            del self._of_queue[queue]
        if self._is_displayed:
            from IPython.display import update_display

            update_display(self._bundle(), display_id=self._display_id, raw=True)  # type: ignore[no-untyped-call]
        for widget in _with_children(self._box):
            _close(widget)

    # What the reader does.

    def _presses(self) -> dict[str, Callable[[LLMQueue], str]]:
        return {"pause": _pause, "resume": _resume, "drain": self._drain, "cancel": _cancel}

    def _press(self, press: Callable[[LLMQueue], str]) -> None:
        queue = self._queue()
        if queue is not None:
            try:
                self._message = press(queue)
            except LLMQError as error:
                self._message = str(error)
        self.tick()

    def _drain(self, queue: LLMQueue) -> str:
        """In a thread with a loop of its own: it may last, and clicks come in any thread, with a loop or without."""
        if self._drainer is None or not self._drainer.is_alive():
            self._drainer = threading.Thread(target=_drain, args=(queue,), name="llmq-drain", daemon=True)
            self._drainer.start()
        return "Draining: what was accepted ends, new calls are refused until resume."

    def _slider_moved(self, change: Any) -> None:
        with self._lock:
            queue = self._queue()
            if self._is_syncing or self._is_closed or queue is None:
                return
            if change["new"] != queue.max_concurrency:
                queue.resize(change["new"])
            self._show_limit(queue.max_concurrency)

    # What it shows.

    def _show(self, figures: Figures) -> None:
        self._numbers.value = figures_html(figures)
        self._lines.value = lines_html(figures.lines)
        self._words.value = html_text(f"{figures.why} {self._message}")
        self._stages.value = stages_html(figures)
        self._buttons["pause"].disabled = figures.state != "open"
        self._buttons["resume"].disabled = figures.state == "closed"
        self._buttons["drain"].disabled = figures.state in ("draining", "closed")
        if figures.limit != self._shown_limit:
            self._show_limit(figures.limit)

    def _show_limit(self, limit: int) -> None:
        self._shown_limit = limit
        self._is_syncing = True
        try:
            if limit > self._slider.max:
                self._slider.max = 2 * limit
            self._slider.value = limit
        finally:
            self._is_syncing = False

    def _bundle(self) -> dict[str, Any]:
        note = LAST if self._is_closed else AS_DRAWN
        static = {"text/html": static_html(self._figures, note), "text/plain": static_text(self._figures, note)}
        return static if self._is_closed else {**self._box._repr_mimebundle_(), **static}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        with self._lock:
            display(self._bundle(), display_id=self._display_id, raw=True)  # type: ignore[no-untyped-call]
            self._is_displayed = True

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        with self._lock:
            return self._bundle()

    def _repr_html_(self) -> str:
        with self._lock:
            return str(self._bundle()["text/html"])

    def __repr__(self) -> str:
        with self._lock:
            return str(self._bundle()["text/plain"])


def _pause(queue: LLMQueue) -> str:
    queue.pause()
    return ""


def _resume(queue: LLMQueue) -> str:
    queue.resume()
    return ""


def _cancel(queue: LLMQueue) -> str:
    return f"Cancelled {queue.cancel():,} waiting calls."


def _drain(queue: LLMQueue) -> None:
    asyncio.run(queue.drain())


def _with_children(widget: Any) -> list[Any]:
    return [widget, *(each for child in getattr(widget, "children", ()) for each in _with_children(child))]


def _close(widget: Any) -> None:
    """With its layout and style, which ipywidgets would keep."""
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if part is not None:
            part.close()


def _has_widgets() -> bool:
    try:
        return find_spec("ipywidgets") is not None
    except (ImportError, ValueError):  # a None in sys.modules
        return False


def _in_notebook() -> bool:
    """Whether there is a kernel, and so a front end to show widgets."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
