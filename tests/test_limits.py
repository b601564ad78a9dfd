"""Limits, order, depth and control through the queue, in virtual time on asyncio and trio."""

import asyncio
import functools
import gc
import math

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmq import Cap, Depth, FairShare, LLMQueue, LLMTaskMeta, Outcome, Priority, Rate, Retry, report_tokens
from llmq.errors import (
    ProviderError,
    QueueCancelledError,
    QueueClosedError,
    QueueDrainingError,
    QueueDroppedError,
    QueueFullError,
    QueueTimeout,
)
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider
from llmq.virtual import VirtualLoop

pytestmark = pytest.mark.anyio


def make_queue(limit=100, *limits, **options):
    return LLMQueue(limit, limits=limits, telemetry=None, **options)


def assert_idle(queue):
    queue._scheduler.check()
    found = queue.statistics()
    assert (found.in_flight, found.waiting, found.at_door, queue.open_operations) == (0, 0, 0, 0)
    assert found.submitted == found.abandoned + sum(found.dropped.values()) + sum(found.ended.values())
    assert not queue._open


class Starts:
    """When each call began, and how many ran at once by key."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.times = []
        self.names = []
        self.now = {}
        self.peak = {}

    async def __call__(self, name=None, seconds=None):
        self.times.append(anyio.current_time())
        self.names.append(name)
        self.now[name] = self.now.get(name, 0) + 1
        self.peak[name] = max(self.peak.get(name, 0), self.now[name])
        try:
            await anyio.sleep(self.seconds if seconds is None else seconds)
        finally:
            self.now[name] -= 1


def most_in_a_window(times, seconds):
    most, first = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.parametrize("burst", [0, 30])
async def test_10000_calls_at_600_a_minute(burst):
    queue, starts = make_queue(50, Rate(600, burst=burst)), Starts(2.0)
    began = anyio.current_time()
    async with queue.map(lambda _: starts(), range(10_000)) as outcomes:
        async for outcome in outcomes:
            outcome.unwrap()
    assert len(starts.times) == 10_000
    assert most_in_a_window(starts.times, 60.0) <= 600 + burst
    assert (10_000 - burst) / 10 >= 0.99 * (starts.times[-1] - began)
    assert_idle(queue)


async def test_caps_and_rates_by_model_hold_apart():
    queue, starts = make_queue(100, Cap(3, by="model_name"), Rate(60, by="model_name", overrides={"b": 600})), Starts(5)
    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        for model in "ab":
            for _ in range(12):
                call = functools.partial(starts, model)
                group.start_soon(functools.partial(queue.submit, call, meta=LLMTaskMeta(model_name=model)))
    assert starts.peak == {"a": 3, "b": 3}
    ends = {name: max(t for t, n in zip(starts.times, starts.names, strict=True) if n == name) for name in "ab"}
    assert ends["b"] - began == pytest.approx(3 * 5 + 0.2, abs=0.01)
    assert ends["a"] - began == pytest.approx(3 * 5 + 2, abs=0.01)
    assert_idle(queue)


async def test_a_slot_too_is_paced_and_explained():
    queue = make_queue(10, Rate(60, by="model_name"))
    meta = LLMTaskMeta(model_name="m", request_id="second")
    async with queue.slot(LLMTaskMeta(model_name="m")):
        pass
    async with anyio.create_task_group() as group:

        async def second():
            async with queue.slot(meta):
                assert queue.explain("second") == "runs"

        group.start_soon(second)
        await anyio.sleep(0.25)
        assert queue.explain("second") == "waits for requests per minute for model_name m, ready in 0.8 s"
        assert queue.explain() == queue.explain("second")
        assert queue.explain("nobody") == "no open call has the request_id 'nobody'"
    assert queue.explain() == "nothing waits"
    assert_idle(queue)


async def test_a_timer_rings_again_for_each_of_those_that_wait():
    queue, starts = make_queue(10, Rate(60)), Starts()
    began = anyio.current_time()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(queue.submit, starts)
    assert [time - began for time in starts.times] == pytest.approx([0, 1, 2, 3], abs=1e-3)
    assert_idle(queue)


class Answer:
    def __init__(self, **usage):
        self.usage = type("Usage", (), usage)()


@pytest.mark.parametrize(
    ("result", "used"),
    [
        (Answer(total_tokens=300), 300),
        (Answer(input_tokens=100, output_tokens=200), 300),
        ({"usage": {"prompt_tokens": 100, "completion_tokens": 200}}, 300),
        ("no usage", 100),
    ],
)
async def test_tokens_are_settled_by_the_usage_of_the_result(result, used):
    queue = make_queue(10, Rate(6000, of="tokens"))

    async def call():
        await anyio.sleep(0)
        return result

    began = anyio.current_time()
    await queue.submit(call, meta=LLMTaskMeta(tokens=100))
    await queue.submit(call, meta=LLMTaskMeta(tokens=100))
    assert anyio.current_time() - began == pytest.approx(used / 100, abs=1e-3)


async def test_tokens_may_be_reported_from_within_the_call_and_on_a_slot():
    queue = make_queue(10, Rate(6000, of="tokens"))

    async def call():
        report_tokens(700)
        return Answer(total_tokens=5)

    began = anyio.current_time()
    await queue.submit(call, meta=LLMTaskMeta(tokens=100))
    async with queue.slot(LLMTaskMeta(tokens=100)) as slot:
        assert anyio.current_time() - began == pytest.approx(7, abs=1e-3)
        slot.report(tokens=200)
    async with queue.slot(LLMTaskMeta(tokens=1)):
        assert anyio.current_time() - began == pytest.approx(9, abs=1e-3)
    report_tokens(3)  # outside: nothing to tell it to
    assert_idle(queue)


async def test_a_cancelled_waiter_and_a_cancelled_start_give_everything_back():
    queue, starts = make_queue(1, Rate(60), Rate(600, of="tokens")), Starts()
    async with queue.slot():
        with anyio.move_on_after(0.5):
            await queue.submit(starts, meta=LLMTaskMeta(tokens=50))
    assert queue.statistics().abandoned == 1
    began = anyio.current_time()
    await queue.submit(starts, meta=LLMTaskMeta(tokens=50))
    assert anyio.current_time() - began <= 0.5 + 1e-6
    assert_idle(queue)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualLoop})], ids=["asyncio"])
async def test_a_caller_cancelled_between_start_and_wake_up_gives_everything_back():
    queue, starts = make_queue(1, Rate(600, of="tokens")), Starts()
    slot = await queue.slot(LLMTaskMeta(tokens=0)).__aenter__()
    task = asyncio.create_task(queue.submit(starts, meta=LLMTaskMeta(tokens=50)))
    await anyio.wait_all_tasks_blocked()
    slot.release()
    assert (queue.statistics().in_flight, starts.times) == (1, []), "it has its slot, and does not know"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert queue.statistics().abandoned == 1
    began = anyio.current_time()
    await queue.submit(starts, meta=LLMTaskMeta(tokens=50))
    assert starts.times == [began]
    assert_idle(queue)


async def test_overflow_reject():
    queue, starts = make_queue(1, max_queued=2, overflow="reject"), Starts(1)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(queue.submit, starts)
        await anyio.sleep(0.5)
        with pytest.raises(QueueFullError, match=r"the queue is full: 2 of 2 waiting; .*max_queued.*overflow"):
            await queue.submit(starts)
        with pytest.raises(QueueFullError):
            async with queue.slot():
                pass
    assert len(starts.times) == 3
    assert [o.outcome for o in queue.records().operations].count("queue_full") == 2
    assert_idle(queue)


async def test_overflow_drop_oldest():
    queue, starts = make_queue(1, max_queued=2, overflow="drop_oldest"), Starts(1)
    dropped = []

    async def submit(name):
        try:
            await queue.submit(functools.partial(starts, name))
        except QueueDroppedError:
            dropped.append(name)

    async with anyio.create_task_group() as group:
        for name in "abcde":
            group.start_soon(submit, name)
            await anyio.wait_all_tasks_blocked()
    assert dropped == ["b", "c"]
    assert starts.names == ["a", "d", "e"]
    assert_idle(queue)


async def test_overflow_wait():
    queue, starts = make_queue(1, max_queued=2), Starts(1)
    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(queue.submit, starts)
        await anyio.sleep(0.5)
        found = queue.statistics()
        assert (found.in_flight, found.waiting, found.at_door) == (1, 2, 3)
    assert len(starts.times) == 6
    assert_idle(queue)


async def test_drain_turns_away_who_stands_at_the_door():
    queue, starts = make_queue(1, max_queued=1), Starts(1)
    refused = []

    async def submit():
        try:
            await queue.submit(starts)
        except QueueDrainingError:
            refused.append(1)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(submit)
        await anyio.sleep(0.5)
        await queue.drain(timeout=5)
    assert (len(starts.times), len(refused)) == (2, 2)
    assert_idle(queue)


async def test_cancel_one_by_key_or_all():
    queue, starts = make_queue(1), Starts(1)
    cancelled = []

    async def submit(name, **meta):
        try:
            await queue.submit(functools.partial(starts, name), meta=LLMTaskMeta(**meta))
        except QueueCancelledError:
            cancelled.append(name)

    async with anyio.create_task_group() as group:
        group.start_soon(submit, "runs")
        await anyio.wait_all_tasks_blocked()
        for name in "abcd":
            model = "m" if name in "bc" else "n"
            group.start_soon(
                functools.partial(submit, name, request_id=name, model_name=model, labels={"agent": name.upper()})
            )
        await anyio.wait_all_tasks_blocked()
        assert queue.cancel(request_id="nobody") == 0
        assert queue.cancel(request_id="a") == 1
        assert queue.cancel(model_name="m", agent="C") == 1
        assert queue.cancel() == 2
    assert sorted(cancelled) == ["a", "b", "c", "d"]
    assert starts.names == ["runs"]
    assert_idle(queue)


async def test_cancel_reaches_those_that_sleep_before_another_attempt():
    queue = make_queue(2)

    async def fail():
        raise ProviderError("", status_code=500)

    async def submit():
        with pytest.raises(QueueCancelledError):
            await queue.submit(fail, retry=Retry(5, base=1000, cap=1000), meta=LLMTaskMeta(request_id="r"))

    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(submit)
        await anyio.sleep(1)
        assert queue.explain("r") == "sleeps before its next attempt"
        assert queue.cancel(request_id="r") == 1
    assert anyio.current_time() - began == pytest.approx(1)
    assert_idle(queue)


async def test_close_answers_everybody():
    queue, starts = make_queue(1), Starts(1)
    answers = []

    async def submit(call, **options):
        try:
            await queue.submit(call, **options)
            answers.append("ran")
        except QueueClosedError:
            answers.append("closed")

    async def fail():
        raise ProviderError("", status_code=500)

    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(submit, fail, retry=Retry(3, base=1000, cap=1000)))
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            group.start_soon(submit, starts)
        await anyio.sleep(0.5)
        queue.close()
        queue.close()
        await submit(starts)
        with pytest.raises(QueueClosedError):
            async with queue.slot():
                pass
        with pytest.raises(QueueClosedError, match="for good"):
            queue.resume()
        await queue.drain(timeout=5)
    assert sorted(answers) == ["closed"] * 4 + ["ran"]
    assert_idle(queue)


async def test_limits_change_while_it_runs_and_nothing_is_lost():
    queue, starts = make_queue(50, Rate(60, by="model_name")), Starts(3)
    meta = LLMTaskMeta(model_name="m")
    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(functools.partial(queue.submit, functools.partial(starts, "m"), meta=meta))
        await anyio.sleep(4.5)
        assert len(starts.times) == 5
        queue.reconfigure(limits=[Rate(600, by="model_name"), Cap(8, by="model_name")])
        assert queue.policy.max_concurrency == 50
    assert starts.peak["m"] == 8
    assert len(starts.times) == 30
    assert anyio.current_time() - began < 4.5 + 25 / 8 * 3 + 6
    queue.reconfigure(max_queued=5, overflow="reject")
    assert queue.policy.limits[-1] == Depth(5)
    queue.reconfigure(max_queued=None, limits=[])
    assert queue.policy.limits == ()
    with pytest.raises(TypeError, match="no max_concurency to change; it has max_concurrency"):
        queue.reconfigure(max_concurency=3)
    with pytest.raises(ValueError, match="at least 1"):
        queue.reconfigure(max_concurrency=0)
    assert_idle(queue)


async def test_low_runs_in_the_end_under_a_stream_of_urgent():
    queue, starts = make_queue(2, ageing_seconds=30), Starts(1)
    done = anyio.Event()
    began = anyio.current_time()

    async def stream():
        while not done.is_set():
            await queue.submit(starts, meta=LLMTaskMeta(priority=Priority.URGENT))

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(stream)
        await anyio.wait_all_tasks_blocked()
        await queue.submit(functools.partial(starts, "low"), meta=LLMTaskMeta(priority=Priority.LOW))
        done.set()
    at = starts.times[starts.names.index("low")] - began
    assert 30 <= at <= 30 + 4
    assert_idle(queue)


async def test_fair_shares_by_weight():
    queue, starts = make_queue(4, fair_share=FairShare("service_id", weights={"a": 3})), Starts(1)
    async with anyio.create_task_group() as group:
        for name in "ab":
            for _ in range(400):
                call = functools.partial(starts, name)
                group.start_soon(functools.partial(queue.submit, call, meta=LLMTaskMeta(service_id=name)))
    first = starts.names[4:404]
    assert first.count("a") / first.count("b") == pytest.approx(3, rel=0.05)


async def test_a_large_call_beside_small_ones_starts_within_what_is_ahead_of_it():
    queue, starts = make_queue(50, Rate(6000, of="tokens", burst=500)), Starts(0)
    began = anyio.current_time()
    async with anyio.create_task_group() as group:

        async def submit(name, tokens):
            await queue.submit(functools.partial(starts, name), meta=LLMTaskMeta(tokens=tokens))

        for _ in range(40):
            group.start_soon(submit, "small", 50)
            await anyio.wait_all_tasks_blocked()
        group.start_soon(submit, "large", 2000)
        await anyio.wait_all_tasks_blocked()
        for _ in range(100):
            group.start_soon(submit, "late", 1)
    at = starts.times[starts.names.index("large")] - began
    assert at <= (40 * 50 + 2000) / 100
    assert "late" not in starts.names[: starts.names.index("large")]


async def test_changes_of_state_are_told_and_a_slow_reader_holds_nobody_up():
    queue, starts = make_queue(1), Starts(1)
    with queue.changes() as changes, queue.changes(size=2) as slow:
        async with anyio.create_task_group() as group:
            for name in "ab":
                meta = LLMTaskMeta("draft", "m", request_id=name)
                group.start_soon(functools.partial(queue.submit, starts, meta=meta))
                await anyio.wait_all_tasks_blocked()
        queue.resize(2)
        queue.pause()
        queue.resume()
        queue.cancel()
        queue.close()
        seen = [(change.kind, change.request_id, change.in_flight, change.waiting) async for change in changes]
        kept = [change async for change in slow]
    assert seen == [
        ("started", "a", 1, 0),
        ("waiting", "b", 1, 1),
        ("started", "b", 1, 0),
        ("ended", "a", 1, 0),
        ("ended", "b", 0, 0),
        ("resized", None, 0, 0),
        ("paused", None, 0, 0),
        ("resumed", None, 0, 0),
        ("closed", None, 0, 0),
    ]
    assert [(change.kind, change.missed) for change in kept] == [("resumed", 7), ("closed", 0)]
    assert not queue._watchers


async def test_a_reader_of_changes_is_woken():
    queue, kinds = make_queue(1), []
    async with anyio.create_task_group() as group:

        async def watch():
            with queue.changes() as changes:
                async for change in changes:
                    kinds.append(change.kind)
                    if change.kind == "ended":
                        return

        group.start_soon(watch)
        await anyio.wait_all_tasks_blocked()
        async with queue.slot():
            await anyio.sleep(1)
    assert kinds == ["started", "ended"]
    assert_idle(queue)


class Forever:
    def __await__(self):
        while True:
            yield


async def test_a_collected_call_sets_the_timer_of_who_comes_next():
    queue, starts = make_queue(1, Rate(60)), Starts()
    began = anyio.current_time()
    call = queue.submit(Forever)
    call.send(None)
    assert queue.statistics().in_flight == 1
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(queue.submit, starts)
            await anyio.sleep(0.5)
            call.close()  # as its collection does
    assert starts.times[0] - began == pytest.approx(1)
    assert_idle(queue)


async def test_50_abandoned_generators_give_all_slots_back():
    queue = make_queue(50)

    async def stream():
        async with queue.slot():
            for number in range(10):
                yield number
                await anyio.sleep(0)

    generators = []
    for _ in range(50):
        generator = stream()
        assert await anext(generator) == 0
        generators.append(generator)
    assert queue.statistics().in_flight == 50
    for generator in generators:
        await generator.aclose()
    assert_idle(queue)


async def test_a_generator_stepped_from_several_tasks():
    queue = make_queue(1)

    async def stream():
        async with queue.slot():
            for number in range(3):
                yield number
                await anyio.sleep(0.1)

    generator, got = stream(), []

    async def step():
        got.append(await anext(generator, None))

    for in_flight in (1, 1, 1, 0):
        async with anyio.create_task_group() as group:
            group.start_soon(step)
        assert queue.statistics().in_flight == in_flight
    assert got == [0, 1, 2, None]
    assert_idle(queue)


METAS = st.builds(
    LLMTaskMeta,
    model_name=st.sampled_from([None, "a", "b"]),
    priority=st.sampled_from(Priority),
    rank=st.integers(0, 2),
    tokens=st.sampled_from([None, 1, 30]),
    labels=st.sampled_from([{}, {"agent": "x"}]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.one_of(st.none(), METAS),
            st.floats(0, 2),
            st.sampled_from(["ok", "fails", "refused"]),
            st.one_of(st.just(math.inf), st.floats(0, 5)),
        ),
        st.tuples(st.just("resize"), st.integers(1, 4)),
        st.tuples(st.just("limits"), st.sampled_from([(), (Cap(1, by="model_name"),), (Rate(60, by="agent"), Cap(2))])),
        st.tuples(st.just("cancel"), st.sampled_from([None, "a"])),
        st.tuples(st.just("pause"), st.booleans()),
        st.tuples(st.just("sleep"), st.floats(0, 3)),
    ),
    max_size=25,
)
LIMITS = st.sampled_from(
    [
        (),
        (Cap(2, by="model_name"),),
        (Rate(120), Cap(1, by="agent")),
        (Rate(600, of="tokens", by="model_name", burst=20), Depth(3)),
        (Depth(2, by="model_name"), Rate(5, per="second", burst=2)),
    ]
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    limit=st.integers(1, 3),
    limits=LIMITS,
    overflow=st.sampled_from(["wait", "reject", "drop_oldest"]),
    share=st.sampled_from([None, FairShare("model_name")]),
    steps=STEPS,
)
async def test_whatever_happens_each_call_gets_one_answer(limit, limits, overflow, share, steps):
    queue = LLMQueue(limit, limits=limits, overflow=overflow, fair_share=share, telemetry=None)
    answers, submitted = [], 0

    async def submit(meta, seconds, ending, patience):
        async def call():
            await anyio.sleep(seconds)
            if ending == "refused":
                raise ProviderError("", status_code=429, headers={"retry-after": "1"})
            if ending == "fails":
                raise RuntimeError("mine")

        answer = "cancelled"
        try:
            with anyio.move_on_after(patience):
                await queue.submit(call, meta=meta, retry=Retry(2, base=0.1, cap=1))
                answer = "ran"
        except Exception as error:
            answer = type(error).__name__
        answers.append(answer)

    async with anyio.create_task_group() as group:
        for kind, *values in steps:
            if kind == "submit":
                submitted += 1
                group.start_soon(submit, *values)
                await anyio.lowlevel.checkpoint()
            elif kind == "resize":
                queue.resize(*values)
            elif kind == "limits":
                queue.reconfigure(limits=values[0])
            elif kind == "cancel":
                queue.cancel(**({} if values[0] is None else {"model_name": values[0]}))
            elif kind == "pause":
                queue.pause() if values[0] else queue.resume()
            else:
                await anyio.sleep(*values)
            queue._scheduler.check()
        queue.resume()
    assert len(answers) == submitted
    assert set(answers) <= {
        "ran",
        "cancelled",
        "RuntimeError",
        "ProviderError",
        "QueueFullError",
        "QueueDroppedError",
        "QueueCancelledError",
    }
    assert_idle(queue)


async def test_the_queue_timeout_says_what_it_waited_for():
    queue = make_queue(5, Rate(1, by="model_name"), queue_timeout=3)
    meta = LLMTaskMeta(model_name="m")
    async with queue.slot(meta):
        pass
    for take in (lambda: queue.submit(Starts(), meta=meta), lambda: queue.slot(meta).__aenter__()):
        with pytest.raises(QueueTimeout, match=r"at last it waits for requests per minute for model_name m, ready in"):
            await take()
    assert_idle(queue)


async def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LLMQueue(0)
    with pytest.raises(TypeError, match="limits are Cap, Rate or Depth"):
        LLMQueue(1, limits=[5])
    with pytest.raises(ValueError, match="overflow is wait"):
        LLMQueue(1, overflow="explode")
    with pytest.raises(ValueError, match="at least 0"):
        report_tokens(-1)
    with pytest.raises(ValueError, match="size must be at least 1"):
        LLMQueue(1).changes(0)


@pytest.mark.parametrize("limits", [(), (Rate(6000),), (Cap(1, by="model_name"),)])
@pytest.mark.parametrize("contended", [False, True])
async def test_a_dropped_slot_comes_back_whatever_the_limits(limits, contended, caplog):
    queue = LLMQueue(1, limits=limits)  # with telemetry: never the short way
    if contended:
        async with anyio.create_task_group() as group:

            async def hold():
                async with queue.slot():
                    await anyio.sleep(1)

            group.start_soon(hold)
            await anyio.wait_all_tasks_blocked()
            slot = await queue.slot(LLMTaskMeta(model_name="m")).__aenter__()
    else:
        slot = await queue.slot(LLMTaskMeta(model_name="m")).__aenter__()
    assert queue.statistics().in_flight == 1
    del slot
    gc.collect()
    assert_idle(queue)
    assert "was never given back" in caplog.text


async def test_a_newcomer_that_starts_by_pushing_out_others_is_not_woken():
    queue, starts = make_queue(10, Rate(600, of="tokens", burst=100), max_queued=1, overflow="drop_oldest"), Starts()
    dropped = []

    async def submit(tokens):
        try:
            await queue.submit(starts, meta=LLMTaskMeta(tokens=tokens))
        except QueueDroppedError:
            dropped.append(tokens)

    async with anyio.create_task_group() as group:
        for tokens in (100, 90):
            group.start_soon(submit, tokens)
            await anyio.wait_all_tasks_blocked()
        await anyio.sleep(1)
        group.start_soon(submit, 2)
    assert (dropped, len(starts.times)) == ([90], 2)
    assert_idle(queue)


async def test_a_slots_metadata_is_in_its_record_and_its_class():
    queue = make_queue(3)
    for _ in range(3):
        async with queue.slot(LLMTaskMeta("draft", "m", priority=Priority.LOW)):
            pass
    assert {(r.stage, r.model_name) for r in queue.records().operations} == {("draft", "m")}
    assert queue.statistics().by_class[Priority.LOW].ended[Outcome.SUCCEEDED] == 3


async def test_after_a_hold_no_storm_follows():
    """Above the provider's rate, with no rate stated: Retry-After alone must keep the share of refusals low."""
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.2, requests_per_minute=4800, bucket_seconds=2))
    queue = make_queue(18)

    def ask(number):
        return provider.complete(ChatRequest("m", [{"role": "user", "content": str(number)}]))

    async with queue.map(ask, range(4000), retry=Retry(6)) as outcomes:
        failed = [outcome async for outcome in outcomes if outcome.error is not None]
    stats = provider.stats()
    assert stats["refused"] > 0
    assert stats["refused"] / stats["requests"] < 0.2
    assert not failed
    assert_idle(queue)
