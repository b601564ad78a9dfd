"""The live panel: figures by hand, widgets in this process, a real kernel, and what is left without them."""

import asyncio
import gc
import subprocess
import sys
import threading
from functools import partial

import anyio
import nbclient
import nbformat
import pytest
from ipywidgets.widgets import widget

import llmq
from llmq import LLMQueue, LLMTaskMeta, Settings
from llmq.errors import ConfigError, ProviderError, QueueCancelledError, QueueDrainingError
from llmq.notebook import live
from llmq.notebook.live import LAST, NO_NOTEBOOK, NO_QUEUE, NO_WIDGETS, Panel, StaticPanel
from llmq.notebook.rolling import MOST_STAGES, OTHER_STAGES, Reader, Rolling
from llmq.records import AttemptRecord, OperationRecord, RecordBuffer, RecordList, Records
from llmq.retry import Kind, Verdict
from tests.test_cards import facts, parsed

DRAFT = LLMTaskMeta(stage="draft")


@pytest.fixture
def show():
    """Panels without a thread, closed at the end."""
    panels = []

    def make(queue):
        panels.append(Panel(queue))
        return panels[-1]

    yield make
    for each in panels:
        each.close()


def make_queue(limit=2, **options):
    return LLMQueue(limit, telemetry=None, **options)


def attempt(at, outcome="ok", *, stage=None, seconds=1.0, **more):
    return AttemptRecord(0, 1, stage, "m", None, None, at - seconds, at - seconds, at, outcome, **more)


def operation(at, outcome="ok", *, stage=None, wait=0.5):
    return OperationRecord(0, stage, "m", None, None, at - 1.0, at, 1, wait, outcome)


def records(attempts=(), operations=()):
    return Records(RecordList(operations), RecordList(attempts))


# Figures.


def test_goodput_is_of_the_last_ten_seconds():
    rolling = Rolling()
    rolling.note(0, 0, 0.0)
    rolling.add(records(operations=[operation(at) for at in range(1, 21)]), 20.0)
    assert rolling.goodput(20.5) == pytest.approx(10 / 9.5)
    assert rolling.goodput(40.0) == 0.0


def test_goodput_of_a_run_that_has_just_begun_is_not_diluted():
    rolling = Rolling()
    rolling.add(records([attempt(100.5), attempt(101.5)], [operation(100.5), operation(101.5)]), 101.5)
    assert rolling.goodput(101.5) == pytest.approx(1.0), "2 calls in the 2 s since the first was submitted"


def test_refusals_count_by_limit_and_fall_out_after_a_minute():
    rolling = Rolling()
    refused = [attempt(5.0, "rejected", limit_type=kind) for kind in ("requests", "requests", "tokens", None)]
    rolling.add(records([*refused, *[attempt(5.0)] * 4]), 5.0)
    assert rolling.refusals() == (0.5, {"requests": 0.25, "tokens": 0.125, "unknown": 0.125})
    rolling.note(0, 0, 64.0)
    assert rolling.refusals()[0] == 0.5
    rolling.note(0, 0, 66.0)
    assert rolling.refusals() == (0.0, {})


def test_times_are_of_what_ended_in_the_last_minute():
    rolling = Rolling()
    assert rolling.times(0.0) == ((None, None), (None, None))
    rolling.add(records([attempt(1.0, seconds=9.0)], [operation(1.0, wait=9.0)]), 1.0)
    rolling.add(
        records(
            [attempt(60.0, seconds=n / 100) for n in range(101)], [operation(60.0, wait=n / 10) for n in range(101)]
        ),
        60.0,
    )
    wait, service = rolling.times(62.0)
    assert wait == pytest.approx((5.0, 9.5))
    assert service == pytest.approx((0.5, 0.95))


def test_tokens_are_unknown_until_somebody_tells_them():
    rolling = Rolling()
    rolling.add(records([attempt(1.0)]), 1.0)
    assert rolling.tokens() is None
    rolling.add(records([attempt(1.0, input_tokens=10, output_tokens=5), attempt(2.0, output_tokens=1)]), 2.0)
    assert rolling.tokens() == 16


def test_lines_are_of_whole_seconds():
    rolling = Rolling()
    rolling.note(3, 7, 100.2)
    rolling.note(4, 8, 100.9)
    rolling.add(records(operations=[operation(100.5), operation(101.5)]), 101.5)
    lines = rolling.lines(101.5)
    assert lines["in flight"][-2:] == (0.0, 4.0)
    assert lines["waiting"][-1] == 8.0
    assert lines["successful calls/s"][-2:] == (0.0, 1.0)
    assert len(lines["429s/s"]) == 59


def test_stages_are_bounded_and_shown_only_where_there_are_any():
    rolling = Rolling()
    rolling.add(records([attempt(1.0)], [operation(1.0)]), 1.0)
    assert rolling.stages() == ()
    named = [operation(1.0, outcome, stage="draft") for outcome in ("ok", "error", "cancelled", "dropped")]
    rolling.add(records([attempt(1.0, "rejected", stage="draft")], named), 1.0)
    none, draft = rolling.stages()
    assert (none.stage, none.succeeded) == ("(none)", 1)
    assert (draft.stage, draft.succeeded, draft.failed, draft.refused) == ("draft", 1, 2, 1)
    rolling.add(records(operations=[operation(1.0, stage=str(n)) for n in range(2 * MOST_STAGES)]), 1.0)
    assert len(rolling.stages()) == MOST_STAGES + 1
    assert rolling.stages()[-1].stage == OTHER_STAGES


def test_records_are_read_once_and_also_after_the_buffer_went_round():
    buffer = RecordBuffer(4)
    assert buffer.since(None, 100) == (Records([], []), None)
    buffer.ended.extend([(n, 0.0, 1.0, 2.0) for n in range(3)])
    found, mark = buffer.since(None, 100)
    assert [each.operation_id for each in found.attempts] == [0, 1, 2]
    assert buffer.since(mark, 100) == (Records([], []), mark)
    buffer.ended.append((3, 0.0, 1.0, 2.0))
    found, mark = buffer.since(mark, 100)
    assert [each.operation_id for each in found.operations] == [3]
    buffer.ended.extend([(n, 0.0, 1.0, 2.0) for n in range(4, 24)])
    found, _ = buffer.since(mark, 100)
    assert [each.operation_id for each in found.operations] == list(range(16, 24))
    found, _ = buffer.since(mark, 2)
    assert [each.operation_id for each in found.operations] == [22, 23]


# A panel in this process, in virtual time.


@pytest.mark.anyio
async def test_a_tick_shows_what_the_queue_does(show):
    class Refused(Exception):
        pass

    async def call(seconds, kind=None):
        await anyio.sleep(seconds)
        if kind is not None:
            raise Refused

    queue = make_queue(2, classify=lambda error: Verdict(Kind.RATE, status_code=429, limit_type="requests"))
    view = show(queue)
    assert facts(view._numbers.value)["in flight"] == "0 of 2"
    assert view._words.value == "Nothing waits. "
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(partial(queue.submit, lambda: call(2.0), meta=DRAFT))
        await anyio.sleep(1.0)
        view.tick()
        shown = facts(view._numbers.value)
        assert (shown["in flight"], shown["waiting"]) == ("2 of 2", "1")
        assert view._words.value == "The oldest waiter, for 1 s: waits for one of 2 slots, all taken. "
    with pytest.raises(Refused):
        await queue.submit(lambda: call(0.0, "429"), meta=DRAFT)
    view.tick()
    shown = facts(view._numbers.value)
    assert shown["goodput"] == "0.75 successful calls/s", "3 in 4 s"
    assert shown["429 share"] == "25.0%: requests 25.0%"
    assert shown["wait p50, p95"].startswith("0.000 s, 1.")
    assert shown["service p50, p95"] == "2.000 s, 2.000 s"
    assert shown["tokens a minute"] == "not told"
    assert ["draft", "3", "1", "1", "2.000 s", "2.000 s"] in parsed(view._stages.value).rows
    assert parsed(view._lines.value).tags >= {"svg", "polyline"}


@pytest.mark.anyio
async def test_nothing_is_sent_where_nothing_changed(show):
    queue = make_queue()
    view = show(queue)
    await anyio.sleep(61)
    view.tick()
    sent = []
    for each in live._with_children(view._box):
        each.observe(sent.append)
    await anyio.sleep(1)
    view.tick()
    assert sent == []
    queue.resize(3)
    view.tick()
    assert {change["owner"] for change in sent} == {view._numbers, view._slider}


@pytest.mark.anyio
async def test_the_slider_sets_the_limit_of_a_running_pipeline(show):
    queue = make_queue(2)
    view = show(queue)

    async def call(_item):
        await anyio.sleep(1.0)

    async with queue.map(call, range(100)) as outcomes:
        async for _ in outcomes:
            if queue.max_concurrency == 2:
                view._slider.value = 8
            elif queue.statistics().in_flight == 8:
                break
        else:
            pytest.fail("the limit was never reached")


@pytest.mark.anyio
async def test_the_slider_follows_the_queue_without_an_echo(show):
    queue = make_queue(2)
    view = show(queue)
    assert view._slider.value == 2
    with queue.changes() as changes:
        queue.resize(5)
        view.tick()
        assert view._slider.value == 5
        queue.resize(500)
        view.tick()
        assert (view._slider.value, view._slider.max) == (500, 1000)
        view._slider.value = 7
        view.tick()
        queue.close()
        assert [each.limit async for each in changes if each.kind == "resized"] == [5, 500, 7]
    assert (view._slider.value, queue.max_concurrency) == (7, 7)


def test_a_look_that_is_late_does_not_move_the_slider_back(show):
    """The reader moves the slider while the panel has read the old limit and not shown it yet."""
    queue = make_queue(2)
    view = show(queue)
    late = view._reader.read(queue)
    view._slider.value = 9
    assert queue.max_concurrency == 9
    view._show(late)
    view.tick()
    assert (queue.max_concurrency, view._slider.value) == (9, 9)


@pytest.mark.anyio
async def test_pause_starts_nothing_and_resume_goes_on(show):
    queue = make_queue(1)
    view = show(queue)
    started = []

    async def call():
        started.append(1)

    view._buttons["pause"].click()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(queue.submit, call)
        await anyio.sleep(100.0)
        assert started == []
        view.tick()
        assert "paused" in facts(view._numbers.value)["in flight"]
        assert "waits for resume()" in view._words.value
        assert view._buttons["pause"].disabled
        view._buttons["resume"].click()
    assert len(started) == 3
    assert not view._buttons["pause"].disabled


@pytest.mark.anyio
async def test_cancel_turns_away_who_waits(show):
    queue = make_queue(1)
    view = show(queue)
    cancelled = []

    async def call():
        try:
            await queue.submit(lambda: anyio.sleep(1.0))
        except QueueCancelledError as error:
            cancelled.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(call)
        await anyio.sleep(0.5)
        view._buttons["cancel"].click()
    assert len(cancelled) == 2
    assert "Cancelled 2 waiting calls." in view._words.value


def test_drain_does_not_block_and_refuses_new_calls(show):
    queue = make_queue(1)
    view = show(queue)

    async def main():
        gate, began = asyncio.Event(), asyncio.Event()

        async def call():
            began.set()
            await gate.wait()

        task = asyncio.ensure_future(queue.submit(call))
        await began.wait()
        with queue.changes() as changes:
            view._buttons["drain"].click()
            async for change in changes:
                if change.kind == "draining":
                    break
        with pytest.raises(QueueDrainingError):
            await queue.submit(call)
        view.tick()
        assert facts(view._numbers.value)["in flight"] == "1 of 1, draining"
        gate.set()
        await task
        await asyncio.to_thread(view._drainer.join)

    asyncio.run(main())


def test_an_error_of_a_button_is_told(show):
    queue = make_queue(1)
    view = show(queue)

    def fail(_queue):
        raise ProviderError("no")

    view._press(fail)
    assert view._words.value.endswith(" no")


# Its end.


def test_close_ends_the_thread_and_leaves_no_widget():
    before = set(_instances())
    queue = make_queue(3)
    view = Panel(queue)
    assert len(_instances()) > len(before)
    view.start(10)
    thread = view._thread
    assert thread.daemon
    assert thread.is_alive()
    view.close()
    assert not thread.is_alive()
    assert set(_instances()) == before
    assert facts(view._repr_html_())["in flight"] == "0 of 3"
    assert LAST in parsed(view._repr_html_()).plain
    assert set(view._repr_mimebundle_()) == {"text/html", "text/plain"}
    view.close()
    view.tick()


def _instances():
    return widget._instances


def test_the_thread_ends_with_the_queue():
    queue = make_queue(3)
    view = Panel(queue)
    view.start(10)
    thread = view._thread
    queue.close()
    thread.join(30)
    assert not thread.is_alive()
    assert view.is_closed
    assert facts(view._repr_html_())["in flight"] == "0 of 3, closed"


def test_a_panel_does_not_keep_its_queue():
    queue = make_queue(3)
    view = Panel(queue)
    view.start(10)
    del queue
    gc.collect()
    view._thread.join(30)
    assert view.is_closed
    assert facts(view._repr_html_())["in flight"] == "0 of 3"


@pytest.mark.anyio
async def test_a_closed_queue_is_shown_until_its_last_call_has_ended(show):
    queue = make_queue(1)
    view = show(queue)
    async with anyio.create_task_group() as group:
        group.start_soon(queue.submit, lambda: anyio.sleep(1.0))
        await anyio.sleep(0.5)
        queue.close()
        view.tick()
        assert not view.is_closed
    view.tick()
    assert view.is_closed


def test_a_later_panel_of_the_same_queue_closes_the_earlier(show):
    queue = make_queue()
    first, other = show(queue), show(make_queue())
    second = show(queue)
    assert (first.is_closed, second.is_closed, other.is_closed) == (True, False, False)


def test_an_open_panel_has_a_widget_and_a_table(show):
    bundle = show(make_queue())._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert "0 of 2 in flight" in bundle["text/plain"]


# Without widgets, notebook, or queue.


def test_with_the_flag_off_it_says_so():
    found = llmq.notebook.panel()
    assert isinstance(found, StaticPanel)
    assert repr(found) == NO_QUEUE
    assert NO_QUEUE in parsed(found._repr_html_()).plain
    found.close()


def test_with_the_flag_on_it_is_the_process_queue():
    llmq.RuntimeEnv.initialize(Settings(llm_queue_enabled=True, llm_queue_concurrency=17))
    assert llmq.notebook.panel().figures.limit == 17


def test_outside_a_notebook_it_is_a_table():
    found = llmq.notebook.panel(make_queue(3))
    assert (found.note, facts(found._repr_html_())["in flight"]) == (NO_NOTEBOOK, "0 of 3")


@pytest.mark.parametrize("rate", [0, -1, 11, float("nan"), "x", None])
def test_a_rate_of_updates_that_cannot_be_is_refused(rate):
    with pytest.raises(ConfigError, match="at most 10, got"):
        llmq.notebook.panel(make_queue(), updates_per_second=rate)


def test_what_is_no_queue_is_refused():
    with pytest.raises(ConfigError, match="shows an LLMQueue.*got 3"):
        llmq.notebook.panel(3)


def test_without_ipywidgets_and_ipython_it_says_what_to_install():
    code = """
import sys
sys.modules["ipywidgets"] = sys.modules["IPython"] = None
import llmq.notebook
print(llmq.notebook.panel(llmq.LLMQueue(3)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.startswith("LLMQueue: 0 of 3 in flight, 0 waiting")
    assert NO_WIDGETS in found.stdout
    assert "pip install 'llmq-toolkit[notebook]'" in NO_WIDGETS
    assert found.stderr == ""


def test_the_reader_asks_again_why_somebody_waits_when_the_state_changes(monkeypatch):
    queue, reader = make_queue(), Reader()
    asked = []
    monkeypatch.setattr(LLMQueue, "explain", lambda self: asked.append(1) or "waits")
    assert reader._explained(queue, 1.0) == "The oldest waiter, for 1 s: waits."
    reader._ask_at = float("inf")
    reader._explained(queue, 1.0)
    assert len(asked) == 1
    queue.pause()
    reader._explained(queue, 1.0)
    assert len(asked) == 2


# In a real kernel.

CELLS = (
    """
import asyncio, threading, time
import llmq
queue = llmq.LLMQueue(4)
view = llmq.notebook.panel(queue, updates_per_second=10)
view
""",
    """
before = view._numbers.value
async def outline(topic):
    await asyncio.sleep(0.02)
async def draft(topic, outline):
    await asyncio.sleep(0.02)
with llmq.using(queue):
    async with llmq.Pipeline([outline, draft]).run(range(50)) as outcomes:
        async for outcome in outcomes:
            outcome.result
while "draft" not in view._stages.value:
    await asyncio.sleep(0.02)
assert view._numbers.value != before
""",
    """
queue.resize(9)
end = time.monotonic() + 30
while view._slider.value != 9 and time.monotonic() < end:
    time.sleep(0.02)  # the loop is blocked, and the panel lives
print(view._slider.value)
""",
    """
view.close()
print([thread.name for thread in threading.enumerate() if "llmq" in thread.name])
""",
    "llmq.notebook.panel(llmq.LLMQueue(5))",
)


@pytest.fixture
def executed(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", store_widget_state=False).execute()
    return notebook


@pytest.mark.filterwarnings("default")  # Jupyter's own start-up leaves warnings
def test_in_a_kernel_it_follows_the_pipeline_and_leaves_a_table(executed):
    shown, pipeline, slider, closed, still_open = (cell.outputs for cell in executed.cells)
    (display,) = shown
    assert set(display["data"]) == {"text/html", "text/plain"}, "the widget went when the panel was closed"
    last = parsed(display["data"]["text/html"])
    assert ["in flight", "0 of 9"] in last.rows
    assert [row[:4] for row in last.rows if len(row) == 6][1:] == [
        ["outline", "50", "0", "0"],
        ["draft", "50", "0", "0"],
    ]
    assert pipeline == []
    assert [each["text"] for each in slider + closed] == ["9\n", "[]\n"]
    (display,) = still_open
    assert "application/vnd.jupyter.widget-view+json" in display["data"]
    assert facts(display["data"]["text/html"])["in flight"] == "0 of 5", "for those who cannot show the widget"
    assert "widgets" not in executed.metadata


def test_no_thread_is_left():
    assert not [thread for thread in threading.enumerate() if thread.name == "llmq-panel"]
