"""The sweep explorer: measure your own pipeline or coroutine from a notebook, by a button.

- Nothing is called before a button. Until then it says what can be said without a call. "Predict" makes the first few
  calls only, and says what the whole would use, in tokens and money, too.
- The sweep runs as a task of the kernel's loop, so the cell is not blocked. A click may come in another thread
  (JupyterLab hands clicks to one of their own), and so may the reports of a virtual sweep: both are handed to the loop.
- It draws between windows and never within one, since the sweep measures this loop's lag: the bar and a line as a
  window begins, an SVG as it ends. The full figure is drawn at the end, in a thread.
- What ends a sweep is one line in the widget. What was measured by then is kept, in `sweep`.
- The display has a static twin without widget state, brought up to date at the end; `close()` leaves only that.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from html import escape
from importlib.util import find_spec
from typing import Any, TypeVar

from llmq.errors import ConfigError, LLMQError
from llmq.notebook.form import CAP_NAMES, Plan, first_form
from llmq.notebook.pictures import as_html, figures_table, points_svg
from llmq.pipeline import Pipeline
from llmq.progress import Bar
from llmq.tune.dry_run import guess
from llmq.tune.guard import Prediction
from llmq.tune.point import Point
from llmq.tune.report import short, text_table
from llmq.tune.running import check_target, endless
from llmq.tune.standing import Bounds
from llmq.tune.sweep import DEFAULT_LEVELS, Sweep, sweep
from llmq.tune.sweep import Progress as SweepProgress
from llmq.tune.sweep_bar import point_line

T = TypeVar("T")

INSTALL = (
    "The explorer needs ipywidgets: pip install 'llmq-toolkit[notebook]', then restart the kernel. Without it: "
    "await llmq.sweep(call_or_pipeline, items)"
)
CLOSED = "This explorer is closed; make another: explorer(call_or_pipeline, items)"
PREDICTED = "Nothing more was called; Measure makes all of it."
NOTHING_TO_PREDICT = "Nothing more was called: it ended before there was anything to predict from."
NO_LOOP = "No event loop is running here, so nothing was started: make the explorer in a cell of a notebook"
DRAW_SECONDS = 0.25
_LONGEST_LINE = 300


def explorer(
    call_or_pipeline: Callable[[T], Awaitable[object]] | Pipeline,
    items: Iterable[T],
    levels: Iterable[int] | str | None = None,
    **sweep_options: Any,
) -> Explorer:
    """A form, a button that runs `llmq.sweep`, and one that predicts from a few calls what that will use.

    Shown where it is the last expression of a cell.

    `sweep_options` are those of `llmq.sweep`; `seconds`, `calls`, `refine` and `caps` fill the form. `title` is shown,
    so it is the place for the provider's name. Nothing is called before a button. `.sweep` holds what was measured
    after it has ended, however it ended, and until another run has measured something; `.error` is why it failed.

    Without ipywidgets it prints what to install. Raises TypeError for an option that `llmq.sweep` does not have, and
    ConfigError for what cannot be measured.
    """
    inspect.signature(sweep).bind(call_or_pipeline, items, **sweep_options)
    check_target(call_or_pipeline)
    endless(items)
    found = Explorer(call_or_pipeline, items, DEFAULT_LEVELS if levels is None else levels, sweep_options)
    if find_spec("ipywidgets") is None:
        print(INSTALL)
    else:
        found.make_form()
    return found


class Explorer:
    """Made by `explorer`. `widget` is the ipywidgets box, None without ipywidgets; `task` the sweep under way."""

    def __init__(self, target: Any, items: Iterable[Any], levels: Iterable[int] | str, options: dict[str, Any]) -> None:
        self.sweep: Sweep | None = None
        self.error: Exception | None = None
        self.widget: Any = None
        self.task: asyncio.Task[None] | None = None
        self._target, self._items, self._options = target, items, options
        self._form: dict[str, Any] = first_form(levels, options)
        self._loop = _running_loop()
        self._display_id: str | None = None
        self._points: list[Point] = []
        self._result = ""
        self._end = ""
        self._prediction: Prediction | None = None
        self._picture_at = 0.0
        self._bar = _new_bar()
        self._closed = False

    @property
    def _bounds(self) -> Bounds:
        return Bounds(
            self._options.get("max_429_ratio", 0.01),
            self._options.get("max_error_ratio", 0.01),
            self._options.get("slo_p95"),
        )

    @property
    def _head(self) -> str:
        """Whom it asks."""
        target = self._target
        what = (
            " → ".join(stage.name for stage in target.stages)
            if isinstance(target, Pipeline)
            else getattr(target, "__name__", "call")
        )
        title = self._options.get("title", "")
        where = "on a virtual clock" if self._options.get("virtual") else ""
        return ", ".join(filter(None, (what, title, where)))

    def _expected(self) -> str:
        """What all of it would use: predicted from the first few calls, else as far as can be said without a call."""
        if self._prediction is not None:
            return f"After the first few calls: all of it uses {self._prediction}."
        try:
            plan = Plan.read(self._form)
        except ConfigError as error:
            return str(error)
        virtual = bool(self._options.get("virtual"))
        said = guess(plan.levels, plan.seconds, plan.calls, refine=plan.refine, virtual=virtual, caps=plan.caps)
        return said if self._end else f"Nothing has been called yet.\n{said}"

    # The form

    def make_form(self) -> None:
        """The widgets. Needs ipywidgets."""
        import ipywidgets as w

        def text(name: str, label: str, hint: str, width: str = "14em") -> Any:
            made = w.Text(self._form[name], description=label, placeholder=hint, layout=w.Layout(width=width))
            made.style.description_width = "initial"
            made.observe(lambda change: self._filled_in(name, change["new"]), "value")
            return made

        self._refine = w.Checkbox(self._form["refine"], description="add levels and paces as needed", indent=False)
        self._refine.observe(lambda change: self._filled_in("refine", change["new"]), "value")
        fields_of = w.HBox(
            [
                text("levels", "calls at once", "1 2 4 8", "26em"),
                text("seconds", "seconds each", "by itself"),
                text("calls", "calls each", "by itself"),
                self._refine,
            ],
            layout=w.Layout(flex_flow="row wrap"),
        )
        labels = {"calls": "at most calls", "tokens": "tokens", "cost": "USD", "minutes": "minutes"}
        caps = w.HBox([text(f"most {name}", labels[name], "no cap") for name in CAP_NAMES])
        caps.layout.flex_flow = "row wrap"
        self._measure_button = w.Button(description="Measure", button_style="primary", icon="play")
        self._predict_button = w.Button(description="Predict", tooltip="a few calls, and what all of it would use")
        self._cancel_button = w.Button(description="Cancel", icon="stop", disabled=True)
        self._measure_button.on_click(lambda _: self.measure())
        self._predict_button.on_click(lambda _: self.predict())
        self._cancel_button.on_click(lambda _: self.cancel())
        self._progress = w.IntProgress(0, min=0, max=1, layout=w.Layout(width="20em"))
        self._said = w.HTML(_lines(self._expected()))
        self._status = w.HTML()
        self._picture = w.HTML()
        self._choice = w.Dropdown(description="measured", options=(), disabled=True)
        self._choice.layout.display = "none"
        self._choice.observe(lambda change: self._chosen(change["new"]), "value")
        self._figures = w.HTML()
        buttons = [self._measure_button, self._predict_button, self._cancel_button]
        head = w.HTML(f"<b>{escape(self._head)}</b>")
        steering = w.HBox([*buttons, self._progress, self._status])
        parts = [head, fields_of, caps, self._said, steering, self._picture, self._choice, self._figures]
        self.widget = w.VBox(parts)

    def _filled_in(self, name: str, value: Any) -> None:
        self._form[name] = value
        if self.task is None:
            self._prediction = None
            self._said.value = _lines(self._expected())

    def measure(self) -> None:
        """What the button does, from whatever thread: start the sweep, as `task`, unless one is under way."""
        self._begin(only_predict=False)

    def predict(self) -> None:
        """The same for its first few calls only, and what the whole would use."""
        self._begin(only_predict=True)

    def _begin(self, *, only_predict: bool) -> None:
        if self.widget is None:
            print(CLOSED if self._closed else INSTALL)
            return
        loop = self._loop if self._loop is not None and not self._loop.is_closed() else _running_loop()
        if loop is None:
            self._say(NO_LOOP)
            return
        self._loop = loop
        self._enable(idle=False)
        self._in_loop(lambda: self._start(only_predict=only_predict))

    def _enable(self, *, idle: bool) -> None:
        self._measure_button.disabled = self._predict_button.disabled = not idle

    def _start(self, *, only_predict: bool) -> None:
        if self.task is not None:
            return
        try:
            plan = Plan.read(self._form)
        except ConfigError as error:
            self._say(str(error))
            self._enable(idle=True)
            return
        self._points.clear()
        self.error = self._prediction = None
        self._bar = _new_bar()
        self._cancel_button.disabled = False
        self._say("the first few calls")
        self.task = asyncio.get_running_loop().create_task(self._run(plan, only_predict=only_predict))
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """However it ended, even before it began."""
        self.task = None
        self._cancel_button.disabled = True
        self._enable(idle=True)
        if task.cancelled():
            self._say("Cancelled.")
        elif (error := task.exception()) is not None:
            self._say(one_line(error))
        self._said.value = _lines(self._expected())
        self._refresh_display()

    def cancel(self) -> None:
        """End the sweep under way, with all its calls; what was measured is kept. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._in_loop(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None and not self._cancel_button.disabled:  # else its last picture is being drawn
            self._cancel_button.disabled = True
            self._say("ending the calls under way")
            self.task.cancel()

    def _in_loop(self, do: Callable[[], object]) -> None:
        if _running_loop() is self._loop:
            do()
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(do)

    # The sweep

    async def _run(self, plan: Plan, *, only_predict: bool) -> None:
        try:
            options = {
                **self._options,
                "seconds": plan.seconds,
                "calls": plan.calls,
                "refine": plan.refine,
                "caps": plan.caps,
                "on_plan": self._predicted if only_predict else self._planned,
                "on_progress": self._heard,
                **({"out": None, "resume": False} if only_predict else {}),
            }
            found = await sweep(self._target, self._items, plan.levels, **options)
            end = f"The sweep {found.stopped}." if found.stopped else "Done."
            if only_predict:
                end = NOTHING_TO_PREDICT if self._prediction is None else PREDICTED
        except asyncio.CancelledError:
            end = "Cancelled."
            found = self._so_far("was cancelled")
        except Exception as error:
            self.error = error
            end = one_line(error)
            found = self._so_far("ended with an error")
        self._cancel_button.disabled = True
        await self._show_result(found, end)

    def _so_far(self, stopped: str) -> Sweep:
        """What was measured before it ended too early."""
        return Sweep(list(self._points), self._bounds, self._options.get("title", ""), stopped=stopped)

    def _predicted(self, prediction: Prediction) -> bool:
        """Told after the first few calls, in the loop that measures: enough."""
        self._prediction = prediction
        return False

    def _planned(self, prediction: Prediction) -> bool:
        """Told after the first few calls, in the loop that measures."""
        self._prediction = prediction
        self._in_loop(self._show_prediction)
        on_plan = self._options.get("on_plan")
        return True if on_plan is None else bool(on_plan(prediction))

    def _show_prediction(self) -> None:
        self._said.value = _lines(self._expected())
        self._say("warming up")

    def _heard(self, progress: SweepProgress) -> None:
        """Told before and after each window, in the loop that measures, when nothing is being measured."""
        self._in_loop(lambda: self._show_progress(progress))
        on_progress = self._options.get("on_progress")
        if on_progress is not None:
            on_progress(progress)

    def _show_progress(self, progress: SweepProgress) -> None:
        bar = self._bar
        bar.done, bar.total = progress.done, progress.total
        self._progress.max, self._progress.value = progress.total, progress.done
        if progress.point is None:
            left = bar.figures()[-1]
            self._say(", ".join(filter(None, (f"measuring {progress.level} at once", left))))
            return
        bar.mark()
        self._points.append(progress.point)
        if time.monotonic() - self._picture_at >= DRAW_SECONDS:
            self._picture_at = time.monotonic()
            self._picture.value = points_svg(self._points, self._bounds) + _lines(point_line(progress.point))

    # The end

    async def _show_result(self, found: Sweep, end: str) -> None:
        """What this run has measured; where that is nothing, what an earlier one had stays."""
        self._end = end
        if not found.points:
            self._progress.value = 0
        else:
            self.sweep = found
            table = f"<pre>{escape(text_table(found))}</pre>"
            self._result = table
            answer, figure = await asyncio.to_thread(_drawn, found)
            self._picture.value = answer + figure
            self._result = answer + figure + table
            judged = found.judged()
            self._choice.options = [(f"{short(point.setting)} at once", n) for n, point in enumerate(judged)]
            self._choice.disabled, self._choice.layout.display = False, None
            self._choice.index = 0  # a Dropdown made without options has none chosen when it gets some
            self._chosen(self._choice.value)
            if found.stopped is None:
                self._progress.max = self._progress.value = len(found.points)
        self._say(end)

    def _chosen(self, number: int | None) -> None:
        if self.sweep is not None and number is not None:
            self._figures.value = figures_table(self.sweep.judged()[number], self.sweep.bounds)

    def _say(self, text: str) -> None:
        self._status.value = escape(text)

    # The display

    def close(self) -> None:
        """Cancel what is under way, and leave the static result in place of the widget."""
        self.cancel()
        self._closed = True
        if self.widget is not None:
            self.widget.close()
            self.widget = None
            self._refresh_display()

    def _bundle(self) -> dict[str, Any]:
        static = {"text/plain": repr(self), "text/html": self._repr_html_()}
        return static if self.widget is None else {**self.widget._repr_mimebundle_(), **static}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._display_id = self._display_id or uuid.uuid4().hex
        display(self._bundle(), raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]

    def _refresh_display(self) -> None:
        if self._display_id is not None:
            from IPython.display import update_display

            update_display(self._bundle(), raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]

    @property
    def _told(self) -> str:
        """Whom it asks, how the last run ended, what all of it would use where that is not known better."""
        return "\n".join(filter(None, [self._head, self._end, "" if self.sweep else self._expected()]))

    def _repr_html_(self) -> str:
        return _lines(self._told) + self._result

    def __repr__(self) -> str:
        return self._told if self.sweep is None else f"{self._told}\n{self.sweep}\n{self.sweep.recommend()}"


def one_line(error: BaseException) -> str:
    """An error on one line, not too long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]} ..."
    return text if isinstance(error, LLMQError) else f"{type(error).__name__}: {text}"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _new_bar() -> Bar:
    bar = Bar("windows", rated=False, now=time.monotonic)
    bar.mark()
    return bar


def _drawn(found: Sweep) -> tuple[str, str]:
    """The operating point and the picture as HTML; takes about half a second, so not in the loop."""
    answer = as_html(found.recommend())
    try:
        file = io.BytesIO()
        found.plot().savefig(file, dpi=110)
    except ImportError as error:
        return answer, _lines(f"For the picture: pip install 'llmq-toolkit[tune]' ({error.name} is missing)")
    picture = base64.b64encode(file.getvalue()).decode("ascii")
    return answer, f'<img alt="the sweep" style="max-width:100%" src="data:image/png;base64,{picture}">'


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")
