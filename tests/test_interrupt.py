"""Interrupt in a real kernel, against the provider over HTTP: what it leaves, counted at the server."""

import asyncio
import contextvars
import json
import time

import pytest
from jupyter_client import KernelManager

import llmq
from llmq.notebook import run
from llmq.testing import serve_provider

# Jupyter's own start-up on Python 3.11 leaves warnings that are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.alone]

SLOTS = 4
DEADLINE_SECONDS = 20
MANY = 2000  # calls: more than could be made before the deadline

SET_UP = f"""
import asyncio, json
import llmq, llmq.notebook
from openai import AsyncOpenAI

queue, MANY = llmq.LLMQueue({SLOTS}), {MANY}

def client(url):
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)

async def ask(item, client=None):
    answer = await (client or here).chat.completions.create(
        model="m", messages=[{{"role": "user", "content": str(item)}}])
    return answer.choices[0].message.content

async def keep(item):
    done.append(await queue.submit(lambda: ask(item)))

async def outline(item):
    return await ask(item)

async def draft(item, outline):
    return await ask(outline)

async def at_once(meeting):
    await meeting.wait()
    return await ask("after")

def tasks():
    return sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks())
"""

CANCELLED, INTERRUPTED = "CancelledError", "KeyboardInterrupt"

CELLS = {
    "map": (
        CANCELLED,
        """
async for outcome in queue.map(ask, range(1_000_000)):
    done.append(outcome.unwrap())
""",
    ),
    "map, interrupted in the body of the loop": (
        CANCELLED,
        """
async for outcome in queue.map(ask, range(1_000_000)):
    done.append(outcome.unwrap())
    if len(done) == 8:
        await asyncio.sleep(3600)
""",
    ),
    "pipeline": (
        CANCELLED,
        """
with llmq.using(queue):
    async with llmq.Pipeline([outline, draft]).run(range(1_000_000)) as outcomes:
        async for outcome in outcomes:
            done.append(outcome.unwrap())
""",
    ),
    "pipeline with the flag off": (
        CANCELLED,
        """
async for outcome in llmq.Pipeline([outline, draft]).run(range(1_000_000), open_items=4):
    done.append(outcome.unwrap())
""",
    ),
    "gather": (CANCELLED, "await asyncio.gather(*map(keep, range(MANY)))"),
    "wait, which leaves its tasks alone": (
        CANCELLED,
        "await asyncio.wait([asyncio.create_task(keep(item)) for item in range(MANY)])",
    ),
    "a task that starts others": (
        CANCELLED,
        """
async def many():
    others = [asyncio.create_task(keep(item)) for item in range(MANY)]
starting = asyncio.create_task(many())
await asyncio.sleep(3600)
""",
    ),
    "a cell without await": (
        INTERRUPTED,
        """
async def read():
    async for outcome in queue.map(ask, range(1_000_000)):
        done.append(outcome.unwrap())
llmq.notebook.run(read)
""",
    ),
    "a cell without await, with wait": (
        INTERRUPTED,
        """
async def read():
    await asyncio.wait([asyncio.create_task(keep(item)) for item in range(MANY)])
llmq.notebook.run(read())
""",
    ),
    "run in a cell with await": (
        INTERRUPTED,
        """
await asyncio.sleep(0)
async def read():
    await asyncio.gather(*map(keep, range(MANY)))
llmq.notebook.run(read)
""",
    ),
}


class Kernel:
    """A kernel and what its cells say."""

    def __init__(self, folder):
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(folder))
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def stop(self):
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def start(self, code):
        return self._client.execute(code)

    def interrupt(self):
        self._manager.interrupt_kernel()

    def end(self, cell):
        """What the cell printed, and the name of its error."""
        printed, error, deadline = "", None, time.monotonic() + DEADLINE_SECONDS
        while True:
            message = self._client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                printed += content["text"]
            elif message["msg_type"] == "error":
                error = content["ename"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error

    def run(self, code):
        printed, error = self.end(self.start(code))
        assert error is None, (error, printed)
        return printed

    def value(self, expression):
        return json.loads(self.run(f"print(json.dumps({expression}))"))


def until(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def provider():
    with serve_provider(latency_seconds=0.2) as served:
        yield served


@pytest.fixture(scope="module")
def slow_provider():
    with serve_provider(latency_seconds=300) as served:
        yield served


@pytest.fixture(scope="module")
def shared_kernel(tmp_path_factory, provider, slow_provider):
    """One for all tests, since after an interrupt it is to be as it was. It ends before the servers."""
    folder = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
        kernel = Kernel(folder)
    kernel.folder = folder
    yield kernel
    kernel.stop()


@pytest.fixture
def kernel(shared_kernel, provider):
    shared_kernel.run(SET_UP)
    shared_kernel.run(f"here = client({provider.url!r}); done = []")
    shared_kernel.idle_tasks = shared_kernel.value("tasks()")
    return shared_kernel


def interrupt(kernel, cell, error):
    began = time.monotonic()
    kernel.interrupt()
    assert kernel.end(cell)[1] == error
    print(f"the cell ended {time.monotonic() - began:.2f} s after the interrupt")


def assert_nothing_goes_on(kernel, provider):
    """And the next cell has all slots; its own requests are all that come while it runs."""
    until(lambda: provider.stats()["in_flight"] == 0)
    requests = provider.stats()["requests"]
    until(lambda: kernel.value("tasks()") == kernel.idle_tasks)
    assert kernel.value("[queue.statistics().in_flight, queue.open_operations]") == [0, 0]
    kernel.run(f"""
here, meeting = client({provider.url!r}), asyncio.Barrier({SLOTS})
await asyncio.gather(*(queue.submit(lambda: at_once(meeting)) for _ in range({SLOTS})))
""")
    assert provider.stats()["requests"] == requests + SLOTS


@pytest.mark.parametrize("name", CELLS)
def test_nothing_goes_on_after_an_interrupted_cell_and_what_it_has_stays(kernel, provider, name):
    error, code = CELLS[name]
    before = provider.stats()["requests"]
    cell = kernel.start(code)
    until(lambda: provider.stats()["requests"] >= before + 4 * SLOTS)
    interrupt(kernel, cell, error)
    assert kernel.value("len(done)") >= SLOTS
    assert_nothing_goes_on(kernel, provider)


@pytest.mark.parametrize("code", ["await {}", "llmq.notebook.run({})"])
def test_an_idle_cell_is_interrupted_at_once(kernel, provider, slow_provider, code):
    """A loop that sleeps is woken: its one call takes five minutes."""
    kernel.run(f"slow = client({slow_provider.url!r})")
    cell = kernel.start(code.format("queue.submit(lambda: ask(1, slow))"))
    until(lambda: slow_provider.stats()["in_flight"] == 1)
    interrupt(kernel, cell, CANCELLED if code.startswith("await") else INTERRUPTED)
    until(lambda: slow_provider.stats()["in_flight"] == 0)
    assert_nothing_goes_on(kernel, provider)


@pytest.mark.parametrize("code", ["sweep = await {}", "sweep = llmq.notebook.run({})"])
def test_an_interrupted_sweep_keeps_its_points_and_is_resumed(kernel, provider, tmp_path, code):
    sweep = f"llmq.sweep(ask, ['a', 'b'], LEVELS, seconds=0.5, refine=False, out={str(tmp_path)!r}, resume=RESUME)"
    points = tmp_path / "points.jsonl"
    cell = kernel.start(code.format(sweep.replace("LEVELS", "[1, 2, 4]").replace("RESUME", "False")))
    until(lambda: points.exists() and points.read_text().endswith("\n"))
    interrupt(kernel, cell, CANCELLED if "await" in code else INTERRUPTED)
    kept = [json.loads(line) for line in points.read_text().splitlines()]
    assert 1 <= len(kept) < 4
    assert len(llmq.Sweep.read(tmp_path).points) == len(kept)
    assert_nothing_goes_on(kernel, provider)
    kernel.run("sweep = await " + sweep.replace("LEVELS", "[1, 2, 4]").replace("RESUME", "True"))
    assert kernel.value("[point.level for point in sweep.points]")[: len(kept)] == [p["level"] for p in kept]
    assert kernel.value("sorted({point.level for point in sweep.points})") == [1, 2, 4]


def test_what_an_earlier_cell_has_started_goes_on(kernel, provider):
    kernel.run("""
async def read():
    async with llmq.Pipeline([outline, draft]).run(range(1_000_000)) as outcomes:
        async for outcome in outcomes:
            done.append(outcome)
with llmq.using(queue):
    reading = asyncio.create_task(read())
""")
    cell = kernel.start("await asyncio.sleep(3600)")
    before = provider.stats()["requests"]
    until(lambda: provider.stats()["requests"] >= before + 4 * SLOTS)  # so that some are the cell's by time
    interrupt(kernel, cell, CANCELLED)
    before = provider.stats()["requests"]
    until(lambda: provider.stats()["requests"] >= before + 4 * SLOTS)
    assert kernel.value("[reading.done(), sum(outcome.error is not None for outcome in done)]") == [False, 0]
    kernel.run("reading.cancel(); await asyncio.wait([reading])")
    assert_nothing_goes_on(kernel, provider)


def test_a_second_interrupt_does_not_wait_for_work_that_takes_long_to_end(kernel, provider):
    marker = kernel.folder / "ending"
    cell = kernel.start(f"""
async def stubborn():
    global loop, released
    loop, released = asyncio.get_running_loop(), asyncio.Event()
    try:
        await ask(1)
        open({str(marker)!r} + "-begun", "w").close()
        await asyncio.sleep(3600)
    finally:
        open({str(marker)!r}, "w").close()
        await released.wait()
llmq.notebook.run(stubborn)
""")
    until((kernel.folder / "ending-begun").exists)
    kernel.interrupt()
    until(marker.exists)
    interrupt(kernel, cell, INTERRUPTED)
    kernel.run("loop.call_soon_threadsafe(released.set)")
    assert_nothing_goes_on(kernel, provider)


def test_a_cell_that_ends_in_a_cancellation_of_its_own_was_not_interrupted(kernel, provider):
    _, error = kernel.end(
        kernel.start("""
staying, gone = [asyncio.create_task(asyncio.sleep(3600)) for _ in range(2)]
gone.cancel()
await gone
""")
    )
    assert error == CANCELLED
    assert kernel.value("[staying.done(), gone.done()]") == [False, True]
    kernel.run("staying.cancel()")
    assert_nothing_goes_on(kernel, provider)


def test_run_returns_the_result_and_raises_the_error():
    async def work():
        await asyncio.sleep(0)
        return "result"

    async def fails():
        raise ValueError("its own")

    assert run(work) == run(work()) == "result"
    with pytest.raises(ValueError, match="its own"):
        run(fails)


def test_run_keeps_its_loop_and_the_callers_context():
    name = contextvars.ContextVar("name", default="")

    async def work():
        return asyncio.get_running_loop(), name.get()

    name.set("mine")
    (loop, seen), (again, _) = run(work), run(work)
    assert loop is again
    assert seen == "mine"


def test_run_leaves_no_task_behind():
    left = []

    async def work():
        left.append(asyncio.create_task(asyncio.sleep(3600)))

    run(work)
    assert left[0].cancelled()


def test_run_within_run_is_refused():
    async def inner():
        raise AssertionError("not reached")

    async def work():
        run(inner())

    with pytest.raises(RuntimeError, match="use `await` here"):
        run(work)


@pytest.mark.parametrize("work", [None, 3, "main"])
def test_what_is_no_work_is_refused(work):
    with pytest.raises(TypeError, match=f"a coroutine.* or an async function.*; got {work!r}"):
        run(work)
