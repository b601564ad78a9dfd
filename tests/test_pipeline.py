import functools

import anyio
import pytest

from llmq import LLMQueue, Pipeline, Retry, RuntimeEnv, Settings, Stage
from llmq.errors import OutOfQuotaError, ProviderError
from llmq.runtime import using

pytestmark = pytest.mark.anyio


class Log:
    """Stages that take time and write down when they began and ended."""

    def __init__(self, seconds=None):
        self.seconds = seconds or {}
        self.began, self.ended = {}, {}
        self.now = self.peak = 0

    async def __call__(self, name, item):
        self.began[name, item] = anyio.current_time()
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await anyio.sleep(self.seconds.get(name, 1.0))
        finally:
            self.now -= 1
        self.ended[name, item] = anyio.current_time()
        return f"{name} of {item}"


def diamond(log):
    async def top(item):
        return await log("top", item)

    async def left(item, top):
        assert top == f"top of {item}"
        return await log("left", item)

    async def right(item, top):
        return await log("right", item)

    async def bottom(item, left, right):
        assert (left, right) == (f"left of {item}", f"right of {item}")
        return await log("bottom", item)

    return Pipeline([top, left, right, bottom])


async def collect(pipeline, items, queue=None, **options):
    with using(queue):
        run = pipeline.run(items, **options)
    async with run as outcomes:
        return [outcome async for outcome in outcomes]


def queue_of(limit):
    return LLMQueue(limit, telemetry=None)


@pytest.mark.parametrize("limit", [None, 1, 8])
async def test_results_are_the_same_with_and_without_a_queue(limit):
    found = await collect(diamond(Log()), ["a", "b"], None if limit is None else queue_of(limit))
    results = {o.item: o.unwrap() for o in found}
    expected = {i: {s: f"{s} of {i}" for s in ("top", "left", "right", "bottom")} for i in ("a", "b")}
    assert results == expected
    assert [list(result) for result in results.values()] == [["top", "left", "right", "bottom"]] * 2


async def test_without_a_queue_stages_run_one_after_the_other():
    log = Log()
    await collect(diamond(log), ["a"])
    assert log.peak == 1


async def test_with_a_queue_a_stage_starts_as_soon_as_its_own_needs_are_met():
    log = Log({"left": 10})

    async def after_right(item, right):
        return await log("after_right", item)

    pipeline = Pipeline([*diamond(log).stages, after_right])
    await collect(pipeline, ["a"], queue_of(8))
    assert log.began["after_right", "a"] == log.ended["right", "a"] < log.ended["left", "a"]


async def test_only_the_queue_bounds_the_calls():
    log = Log()
    queue = queue_of(6)
    await collect(diamond(log), range(12), queue, open_items=1)
    assert log.peak == 6


async def test_older_items_finish_first():
    log = Log()
    queue = queue_of(2)
    found = await collect(diamond(log), range(6), queue, open_items=6)
    order = [o.item for o in found]
    assert all(abs(place - item) <= 2 for place, item in enumerate(order)), order  # trio starts tasks in any order
    assert log.ended["bottom", order[0]] < log.began["left", order[-1]]
    assert {o.stage for o in queue.records().operations} == {"top", "left", "right", "bottom"}


@pytest.mark.parametrize("limit", [None, 4])
async def test_an_error_ends_its_item_and_no_other(limit):
    async def first(item):
        return item

    async def second(item, first):
        if item == 2:
            raise ValueError("bad item")
        return first

    queue = None if limit is None else queue_of(limit)
    found = await collect(Pipeline([first, second]), range(5), queue)
    assert {o.item: repr(o.error) for o in found} == {
        n: "ValueError('bad item')" if n == 2 else "None" for n in range(5)
    }
    if queue:
        assert queue.open_operations == 0


async def test_items_are_pulled_a_window_at_a_time():
    pulled = []

    def items():
        for number in range(100):
            pulled.append(number)
            yield number

    seen = 0
    with using(queue_of(2)):
        run = diamond(Log()).run(items(), open_items=3)
    async with run as outcomes:
        async for _ in outcomes:
            seen += 1
            assert len(pulled) - seen <= 2 * 3
    assert seen == 100


async def test_the_window_defaults_to_the_setting():
    RuntimeEnv.initialize(Settings(concurrency=2))
    log = Log()
    await collect(diamond(log), range(8))
    assert log.peak == 2


async def test_an_ungated_stage_takes_no_slot():
    log = Log()
    queue = queue_of(1)
    stages = [Stage("free", functools.partial(log, "free"), gated=False)]
    await collect(Pipeline(stages), range(4), queue, open_items=4)
    assert log.peak == 4
    assert queue.records().operations == []


@pytest.mark.parametrize("limit", [None, 2])
async def test_retry_applies_to_each_gated_stage(limit):
    calls = []

    async def call(item):
        calls.append(item)
        if len(calls) < 3:
            raise ProviderError("no", status_code=500)

    queue = None if limit is None else queue_of(limit)
    (outcome,) = await collect(Pipeline([call]), ["a"], queue, retry=Retry(3, base=0.5))
    assert outcome.error is None
    assert len(calls) == 3


async def first(item):
    pass


async def needs_last(item, last):
    pass


async def last(item):
    pass


async def none():
    pass


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([first, first], "two stages are named 'first'"),
        ([needs_last], "needs 'last', which does not exist"),
        ([needs_last, last], "needs 'last', which stands after it"),
        ([none], "takes no argument"),
    ],
)
async def test_what_is_no_pipeline_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(stages)


async def test_open_items_must_be_positive():
    with pytest.raises(ValueError, match="open_items must be at least 1"):
        Pipeline([first]).run([], open_items=0)


async def test_where_nothing_more_may_start_what_is_in_flight_is_awaited_and_nothing_follows_it():
    log = Log({"left": 2.0})

    async def refused(item):
        raise OutOfQuotaError("no")

    async def left(item):
        return await log("left", item)

    async def after_left(item, left):
        return await log("after_left", item)

    pipeline = Pipeline([refused, left, after_left])
    (outcome,) = await collect(pipeline, ["x"], queue_of(4))
    assert isinstance(outcome.error, OutOfQuotaError)
    assert set(log.ended) == {("left", "x")}, "it is paid for, and an answer may be kept"
    assert ("after_left", "x") not in log.began
