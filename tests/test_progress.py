"""Progress of `map`, pipelines and sweeps: in a terminal, as lines, in a notebook."""

import asyncio
import io
import re
import threading

import anyio
import nbclient
import nbformat
import pytest
from rich.console import Console

import llmq
from llmq import LLMQueue, Pipeline, Retry, Settings
from llmq import progress as progress_module
from llmq.errors import ProviderError
from llmq.progress import Bar
from llmq.runtime import RuntimeEnv
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider
from tests.conftest import BACKENDS

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[True, False], ids=["terminal", "lines"])
def shown(request, monkeypatch):
    """What a run shows, without control characters."""
    file = io.StringIO()
    monkeypatch.setattr(
        progress_module, "new_console", lambda: Console(file=file, force_terminal=request.param, width=150)
    )
    return lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def last(text):
    """The last state, a line a bar, each with single blanks and without its bar."""
    return [" ".join(re.sub("[━╸╺,;]", " ", line).split()) for line in text.splitlines() if line.strip()]


def no_thread_draws_on():
    for thread in threading.enumerate():
        if type(thread).__name__ == "_RefreshThread":  # rich's
            thread.join(5)
            assert not thread.is_alive()


async def call(item):
    await anyio.sleep(1)
    if item % 10 == 9:
        raise ValueError("not this one")
    return item


async def read(run):
    async with run as outcomes:
        return [outcome async for outcome in outcomes]


async def test_map_shows_what_is_done_and_what_has_failed(shown):
    await read(LLMQueue(4).map(call, range(40), progress=True))
    assert last(shown())[-1] == "calls 40/40 4 failed 4/s"


async def test_without_being_asked_nothing_is_shown(shown):
    await read(LLMQueue(4).map(call, range(4)))
    await read(Pipeline([call]).run(range(4)))
    assert shown() == ""


async def test_items_of_unknown_number_have_a_count_and_a_rate_but_no_time_left(shown, monkeypatch):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    await read(LLMQueue(4).map(call, iter(range(8)), progress=True))
    assert last(shown())[-1] == "calls 8 4/s"
    assert "left" not in shown()
    assert "/8" not in shown()


async def test_meanwhile_it_says_what_is_in_flight_and_the_time_left(monkeypatch):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    file = io.StringIO()
    monkeypatch.setattr(progress_module, "new_console", lambda: Console(file=file, width=150))
    await read(LLMQueue(4).map(call, range(40), progress=True))
    assert "calls 6/40, 2 in flight, 3/s, 0:12 left" in file.getvalue().splitlines()


async def test_a_pipeline_has_a_bar_a_stage_and_says_what_is_not_reached(shown):
    async def outline(item):
        await anyio.sleep(1)
        return item

    async def draft(item, outline):
        await anyio.sleep(1)
        if item == 3:
            raise ValueError("no")

    async def title(item, draft):
        await anyio.sleep(1)

    await read(Pipeline([outline, draft, title]).run(range(6), open_items=2, progress=True))
    off = shown()
    RuntimeEnv.reset()
    RuntimeEnv.initialize(Settings(llm_queue_enabled=True, llm_queue_concurrency=2))
    await read(Pipeline([outline, draft, title]).run(range(6), open_items=2, progress=True))
    for text in (off, shown()[len(off) :]):
        lines = " ".join(last(text)[-3:])
        assert re.search(r"outline 6/6 (\S+ )?draft 6/6 1 failed (\S+ )?title 6/6 1 not reached", lines), lines


async def test_an_attempt_that_is_tried_again_counts_once(shown):
    tries = []

    async def refused_once(item):
        tries.append(item)
        await anyio.sleep(1)
        if tries.count(item) == 1:
            raise ProviderError("busy", status_code=503)

    await read(LLMQueue(2).map(refused_once, range(4), retry=Retry(), progress=True))
    assert len(tries) == 8
    assert last(shown())[-1].startswith("calls 4/4"), last(shown())
    assert "failed" not in shown()


async def test_leaving_early_shows_how_far_it_came_and_stops(shown):
    run = LLMQueue(4).map(call, range(40), progress=True)
    async with run as outcomes:
        async for outcome in outcomes:
            if outcome.index == 8:
                break
    said = shown()
    assert re.match(r"calls (9|1\d)/40 .*stopped$", last(said)[-1]), said
    no_thread_draws_on()


async def test_an_error_of_the_items_ends_the_bar(shown):
    def broken():
        yield from range(5)
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        await read(LLMQueue(4).map(call, broken(), progress=True))
    assert re.match(r"calls 5 .*stopped$", last(shown())[-1])


async def test_what_is_cancelled_from_outside_has_not_failed(shown):
    with anyio.move_on_after(2.5):
        await read(LLMQueue(4).map(call, range(9), progress=True))
    assert last(shown())[-1] == "calls 8/9 4/s stopped"


@pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
async def test_plain_iteration_that_is_left_ends_the_bar(shown):
    run = LLMQueue(4).map(call, range(40), progress=True)
    outcomes = aiter(run)
    await anext(outcomes)
    await outcomes.aclose()
    assert last(shown())[-1].endswith("stopped")


def test_an_interrupt_ends_the_bar(shown):
    async def interrupted(item):
        if item == 5:
            raise KeyboardInterrupt
        await asyncio.sleep(0)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(read(LLMQueue(1).map(interrupted, range(10), progress=True)))
    assert re.match(r"calls 5/10 \S+/s stopped$", last(shown())[-1])
    no_thread_draws_on()


async def test_lines_are_few(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    file = io.StringIO()
    monkeypatch.setattr(progress_module, "new_console", lambda: Console(file=file, width=150))

    async def a_second(item):
        await anyio.sleep(1)
        now[0] += 1

    await read(LLMQueue(1).map(a_second, range(20), progress=True))
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == [
        "calls 5/20",
        "calls 10/20",
        "calls 15/20",
        "calls 20/20",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(9.2, "0:10 left"), (100, "1:40 left"), (7322, "2:02:02 left")])
def test_the_time_left_is_minutes_and_seconds(seconds, said):
    now = [0.0]
    bar = Bar("calls", 11, now=lambda: now[0])
    bar.mark()
    now[0], bar.done = seconds / 10, 1
    bar.mark()
    assert bar.figures()[-1] == said


@pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
async def test_a_sweep_shows_its_windows(shown):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))

    async def ask(item):
        return await provider.complete(ChatRequest("m", [{"role": "user", "content": str(item)}]))

    await llmq.sweep(ask, range(5), [2, 4], seconds=20, refine=False)
    lines = last(shown())
    assert any(line.startswith("[1/") and "at once:" in line and "ok/s" in line for line in lines), lines
    assert re.match(r"windows (\d+)/\1$", lines[-1]), lines


@pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
async def test_a_sweep_that_fails_ends_its_bar(shown):
    async def fails(item):
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        await llmq.sweep(fails, range(5), [2, 4], seconds=20)
    assert last(shown())[-1:] in ([], ["warming up 0 stopped"])  # a log says nothing of what has not begun


CELL = """
import asyncio, llmq
async def call(item):
    await asyncio.sleep(0.01)
    return item
queue = llmq.LLMQueue(4)
async for outcome in queue.map(call, range(100), progress=True):
    pass
""".strip()


@pytest.fixture
def _quiet_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("_quiet_kernel")
def test_in_a_notebook_it_is_one_display_that_reaches_its_end(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = notebook.cells[0]["outputs"]
    assert '<progress value="100" max="100">' in output["data"]["text/html"]
    assert output["data"]["text/plain"].startswith("calls 100/100")
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
async def test_it_costs_no_task_an_item(shown):
    most = 0

    async def watched(item):
        nonlocal most
        await anyio.sleep(1)
        most = max(most, len(asyncio.all_tasks()))

    before = len(asyncio.all_tasks())
    await read(LLMQueue(5).map(watched, range(100), progress=True))
    assert most == before + 6, "the slots and one that waits"
