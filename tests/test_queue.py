import asyncio
import contextlib
import functools

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq import LLMQueue, LLMTaskMeta, Priority, Retry
from llmq.core import Outcome
from llmq.errors import OutOfQuotaError, ProviderError, QueueDrainingError, QueueTimeout, RequestTimeout
from llmq.retry import Kind, Verdict
from llmq.virtual import VirtualLoop

pytestmark = pytest.mark.anyio


def make_queue(limit=2, **options):
    return LLMQueue(limit, telemetry=None, **options)


class Calls:
    """Counts calls in flight, and remembers the most."""

    def __init__(self):
        self.now = self.peak = self.total = 0

    async def __call__(self, seconds=1.0, result=None):
        self.now += 1
        self.total += 1
        self.peak = max(self.peak, self.now)
        try:
            await anyio.sleep(seconds)
        finally:
            self.now -= 1
        return result


async def run_all(*functions):
    async with anyio.create_task_group() as group:
        for function in functions:
            group.start_soon(function)


def assert_idle(queue):
    queue._scheduler.check()
    found = queue.statistics()
    assert (found.in_flight, found.waiting, queue.open_operations) == (0, 0, 0)
    assert found.submitted == found.abandoned + sum(found.dropped.values()) + sum(found.ended.values())


async def test_result_passes_through():
    queue = make_queue()
    assert await queue.submit(functools.partial(Calls(), result="answer")) == "answer"
    assert_idle(queue)


async def test_exception_passes_through_unchanged():
    queue = make_queue()
    planted = RuntimeError("mine")

    async def fail():
        raise planted

    with pytest.raises(RuntimeError) as caught:
        await queue.submit(fail)
    assert caught.value is planted
    assert queue.records().operations[0].outcome == "error"
    assert_idle(queue)


async def test_never_more_than_the_cap_and_all_of_it():
    queue, calls = make_queue(3), Calls()
    started = anyio.current_time()
    await run_all(*[functools.partial(queue.submit, calls) for _ in range(9)])
    assert calls.peak == 3
    assert anyio.current_time() - started == pytest.approx(3.0)
    assert_idle(queue)


async def test_priority_and_rank_decide_the_order():
    queue = make_queue(1)
    order = []

    async def call(name):
        order.append(name)

    async def submit(name, **meta):
        await queue.submit(functools.partial(call, name), meta=LLMTaskMeta(**meta))

    async with queue.slot():
        async with anyio.create_task_group() as group:
            group.start_soon(functools.partial(submit, "new", rank=2))
            await anyio.wait_all_tasks_blocked()
            group.start_soon(functools.partial(submit, "old", rank=1))
            await anyio.wait_all_tasks_blocked()
            group.start_soon(functools.partial(submit, "urgent", priority=Priority.URGENT, rank=3))
            await anyio.wait_all_tasks_blocked()
            group.start_soon(functools.partial(submit, "low", priority=Priority.LOW))
            await anyio.wait_all_tasks_blocked()
            queue.resize(2)
    assert order == ["urgent", "old", "new", "low"]


async def test_cancelled_while_waiting_leaves_the_queue():
    queue, calls = make_queue(1), Calls()
    async with queue.slot():
        with anyio.move_on_after(1.0) as scope:
            await queue.submit(calls)
        assert scope.cancelled_caught
        assert queue.statistics().waiting == 0
    assert calls.total == 0
    assert queue.records().operations[0].outcome == "cancelled"
    assert_idle(queue)


async def test_cancelled_while_running_frees_the_slot_when_the_call_has_really_ended():
    queue = make_queue(1)

    async def slow_to_stop():
        try:
            await anyio.sleep(10)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)

    async with anyio.create_task_group() as group:

        async def cancelled():
            with anyio.move_on_after(1.0):
                await queue.submit(slow_to_stop)

        group.start_soon(cancelled)
        await anyio.sleep(2)
        assert queue.statistics().in_flight == 1
        await anyio.sleep(2.5)
        assert queue.statistics().in_flight == 0
    assert_idle(queue)


async def test_the_request_timeout_counts_from_the_slot():
    queue, calls = make_queue(1, request_timeout=1.5), Calls()
    await run_all(*[functools.partial(queue.submit, calls) for _ in range(4)])  # the last waits 3 s
    assert [r.outcome for r in queue.records().operations] == ["ok"] * 4
    with pytest.raises(RequestTimeout, match=r"request_timeout=1.5 s"):
        await queue.submit(functools.partial(calls, 2.0))
    assert queue.records().operations[-1].outcome == "timeout"
    assert_idle(queue)


async def test_the_callers_own_timeout_error_is_not_ours():
    queue = make_queue(1, request_timeout=5)

    async def fail():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await queue.submit(fail)


async def test_the_queue_timeout_bounds_the_wait():
    queue, calls = make_queue(1, queue_timeout=2.0), Calls()
    async with queue.slot():
        with pytest.raises(QueueTimeout, match=r"waited queue_timeout=2 s for one of 1 slots"):
            await queue.submit(calls)
    await queue.submit(functools.partial(calls, 10.0))  # running long is no waiting
    assert calls.total == 1
    assert_idle(queue)


async def test_resize_takes_effect_at_once():
    queue, calls = make_queue(1), Calls()
    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(queue.submit, calls)
        await anyio.sleep(0.5)
        assert calls.now == 1
        queue.resize(4)
        await anyio.sleep(0.1)
        assert calls.now == 4
        queue.resize(1)
        await anyio.sleep(0.5)
        assert calls.now == 3, "running calls keep their slots"
    assert_idle(queue)


async def test_pause_and_resume():
    queue, calls = make_queue(2), Calls()
    queue.pause()
    async with anyio.create_task_group() as group:
        group.start_soon(queue.submit, calls)
        await anyio.sleep(5)
        assert (calls.total, queue.statistics().paused, queue.statistics().waiting) == (0, True, 1)
        assert queue.statistics().oldest_wait_seconds == pytest.approx(5)
        queue.resume()
    assert calls.total == 1


async def test_drain_refuses_what_is_new_and_finishes_what_is_there():
    queue, calls = make_queue(1), Calls()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(queue.submit, calls)
        await anyio.sleep(0.5)
        group.start_soon(queue.drain)
        await anyio.sleep(0.1)
        with pytest.raises(QueueDrainingError, match="resume"):
            await queue.submit(calls)
    assert calls.total == 3
    await queue.drain()
    queue.resume()
    await queue.submit(calls)
    assert calls.total == 4
    assert_idle(queue)


async def test_drain_waits_for_a_retry_too_and_lets_it_finish():
    queue = make_queue(1)
    call = FailsFirst(1, status_code=503)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(queue.submit, call, retry=Retry(3, base=4, cap=4)))
        await anyio.sleep(1.1)
        await queue.drain()
        assert (call.calls, queue.open_operations) == (2, 0)
    assert_idle(queue)


async def test_drain_gives_up_after_its_timeout_with_the_figure():
    queue, calls = make_queue(1), Calls()
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(queue.submit, functools.partial(calls, 10)))
        await anyio.sleep(1)
        with pytest.raises(QueueTimeout, match=r"1 calls were still open after drain\(timeout=2\)"):
            await queue.drain(2)
    assert_idle(queue)


class FailsFirst:
    """Raises a provider's error the first `times` times; a second each."""

    def __init__(self, times, **error):
        self.times, self.error = times, error
        self.calls = 0
        self.started = []

    async def __call__(self):
        self.calls += 1
        self.started.append(anyio.current_time())
        await anyio.sleep(1)
        if self.calls <= self.times:
            raise ProviderError("refused", **self.error)
        return "answer"


async def test_without_retry_nothing_is_retried():
    queue, call = make_queue(), FailsFirst(1, status_code=429)
    with pytest.raises(ProviderError):
        await queue.submit(call)
    assert call.calls == 1
    assert queue.records().operations[0].outcome == "rejected"
    assert queue.statistics().ended[Outcome.REJECTED] == 1


async def test_retry_holds_no_slot_and_is_one_operation_of_many_attempts(monkeypatch):
    monkeypatch.setattr("random.random", lambda: 0.9)
    queue, call, others = make_queue(1), FailsFirst(2, status_code=500), Calls()
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(queue.submit, call, retry=Retry(3, base=100, cap=100)))
        await anyio.sleep(1.5)
        before = anyio.current_time()
        await queue.submit(others)
        assert anyio.current_time() - before == pytest.approx(1), "the slot was free during back-off"
    (operation,) = [o for o in queue.records().operations if o.attempts > 1]
    assert (operation.attempts, operation.outcome) == (3, "ok")
    attempts = [a for a in queue.records().attempts if a.operation_id == operation.operation_id]
    assert [(a.attempt, a.outcome, a.status_code) for a in attempts] == [
        (1, "error", 500),
        (2, "error", 500),
        (3, "ok", None),
    ]
    assert_idle(queue)


async def test_retry_gives_up_after_its_attempts_with_the_last_error():
    queue, call = make_queue(), FailsFirst(9, status_code=500)
    with pytest.raises(ProviderError):
        await queue.submit(call, retry=Retry(3, base=0.1, cap=1))
    assert call.calls == 3
    assert_idle(queue)


@pytest.mark.parametrize("error", [{"status_code": 400}, {"status_code": 429, "body": {"code": "insufficient_quota"}}])
async def test_what_cannot_get_better_is_not_retried(error):
    queue, call = make_queue(), FailsFirst(9, **error)
    with pytest.raises(ProviderError):
        await queue.submit(call, retry=Retry(5))
    assert call.calls == 1


async def test_a_retried_attempt_goes_before_its_class():
    queue, call = make_queue(1), FailsFirst(1, status_code=500)
    order = []

    async def other(name):
        order.append(name)
        await anyio.sleep(10)

    async with anyio.create_task_group() as group:

        async def retried():
            await queue.submit(call, retry=Retry(2, base=2, cap=2))
            order.append("retried")

        group.start_soon(retried)
        await anyio.sleep(0.5)
        for name in "ab":
            group.start_soon(queue.submit, functools.partial(other, name))
            await anyio.wait_all_tasks_blocked()
    assert order == ["a", "retried", "b"]


async def test_retry_after_holds_back_every_waiter_of_that_model_and_no_other():
    queue = make_queue(2)
    refused = FailsFirst(1, status_code=429, headers={"retry-after": "20"})
    began = anyio.current_time()
    started = {}

    async def call(name):
        started[name] = anyio.current_time() - began

    async with anyio.create_task_group() as group:

        async def submit(name, model):
            await queue.submit(functools.partial(call, name), meta=LLMTaskMeta(model_name=model))

        group.start_soon(
            functools.partial(queue.submit, refused, meta=LLMTaskMeta(model_name="m"), retry=Retry(2, base=1, cap=1))
        )
        await anyio.sleep(1.5)
        assert queue.statistics().held_keys == ("m",)
        group.start_soon(submit, "same", "m")
        group.start_soon(submit, "other", "n")
    assert started["other"] == pytest.approx(1.5)
    assert 21 <= started["same"] <= 24.2
    assert 20 <= refused.started[1] - began - 1 <= 22.2
    assert queue.statistics().held_keys == ()
    assert_idle(queue)


async def test_a_refused_slot_does_not_go_to_the_next_of_its_model():
    queue, calls = make_queue(1), Calls()
    refused = FailsFirst(1, status_code=429, headers={"retry-after": "20"})
    began = anyio.current_time()
    ended = []

    async def submit(model):
        await queue.submit(calls, meta=LLMTaskMeta(model_name=model))
        ended.append((model, anyio.current_time() - began))

    async with anyio.create_task_group() as group:
        again = functools.partial(queue.submit, refused, meta=LLMTaskMeta(model_name="m"), retry=Retry(2))
        group.start_soon(again)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(submit, "m")
        await anyio.wait_all_tasks_blocked()
        group.start_soon(submit, "n")
    assert ended[0] == ("n", pytest.approx(2))
    assert ended[1][1] >= 1 + 20 + 1
    assert_idle(queue)


@pytest.mark.parametrize("retry", [Retry(2), None])
async def test_a_hold_lasts_as_long_as_the_provider_said_whatever_becomes_of_the_refused_call(retry):
    queue, calls = make_queue(1), Calls()
    refused = FailsFirst(1, status_code=429, headers={"retry-after": "1000"})
    with anyio.move_on_after(5), pytest.raises(ProviderError) if retry is None else contextlib.nullcontext():
        await queue.submit(refused, retry=retry)
    began = anyio.current_time()
    assert queue.statistics().held_keys == (None,)
    assert "Retry-After" in queue.explain() or queue.statistics().waiting == 0
    await queue.submit(calls)
    assert 990 < anyio.current_time() - began < 1002
    assert queue.statistics().held_keys == ()
    assert_idle(queue)


async def test_a_broken_classify_loses_no_slot():
    def broken(error):
        raise KeyError("oops")

    queue = make_queue(1, classify=broken)
    with pytest.raises(ProviderError) as caught:
        await queue.submit(FailsFirst(1, status_code=429), retry=Retry(3))
    assert "classify() itself raised KeyError" in caught.value.__notes__[0]
    assert_idle(queue)


async def test_records_tell_waits_and_service_times():
    queue = make_queue(1)
    meta = LLMTaskMeta("draft", "m", "s1", "r1")
    await run_all(*[functools.partial(queue.submit, Calls(), meta=meta) for _ in range(2)])
    first, second = queue.records().operations
    assert (first.stage, first.model_name, first.service_id, first.request_id) == ("draft", "m", "s1", "r1")
    assert (first.wait_seconds, second.wait_seconds) == (0.0, pytest.approx(1.0))
    assert second.duration_seconds == pytest.approx(2.0)
    assert queue.records().attempts[1].service_seconds == pytest.approx(1.0)


async def test_records_are_bounded_and_make_a_frame():
    queue = make_queue(1, max_records=2)
    for _ in range(5):
        await queue.submit(functools.partial(Calls(), 0.25))
    found = queue.records()
    assert len(found.operations) == len(found.attempts) == 2
    frame = found.attempts.to_pandas()
    assert list(frame["service_seconds"]) == pytest.approx([0.25, 0.25])
    assert list(frame["outcome"]) == ["ok", "ok"]
    assert len(make_queue().records().operations.to_pandas()) == 0


async def test_all_records_are_kept_where_that_is_asked_for(monkeypatch):
    monkeypatch.setitem(LLMQueue.__init__.__kwdefaults__, "max_records", 2)
    queue = make_queue(1, max_records=None)
    for _ in range(5):
        await queue.submit(functools.partial(Calls(), 0.25))
    found = queue.records()
    assert len(found.operations) == len(found.attempts) == 5


async def test_a_slot_lasts_as_long_as_its_block():
    queue = make_queue(1)
    async with queue.slot(LLMTaskMeta("stream")) as slot:
        assert queue.statistics().in_flight == 1
    assert queue.statistics().in_flight == 0
    with pytest.raises(RuntimeError, match="entered before"):
        async with slot:
            pass
    with pytest.raises(ValueError, match="boom"):
        async with queue.slot():
            raise ValueError("boom")
    assert [o.outcome for o in queue.records().operations] == ["ok", "error"]
    assert_idle(queue)


async def test_a_lease_ends_once_whoever_ends_it():
    queue = make_queue(1)
    async with queue.slot() as slot:
        slot.release()
        assert queue.statistics().in_flight == 0
        async with queue.slot():
            slot.release()
            assert queue.statistics().in_flight == 1
    assert len(queue.records().operations) == 2
    assert_idle(queue)


async def test_a_slot_of_the_short_way_goes_to_who_waits_for_it():
    queue, calls = make_queue(2), Calls()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group, queue.slot():
            async with queue.slot() as slot:
                assert slot.lease is not None, "the slot before has lent what was free"
                group.start_soon(queue.submit, calls)
                await anyio.sleep(1)
                assert (calls.total, queue.statistics().waiting) == (0, 1)
            await anyio.sleep(0.1)
            assert calls.total == 1
    assert_idle(queue)


async def test_a_collected_slot_comes_back_and_is_recorded():
    queue, calls = make_queue(1), Calls()

    async def stream():
        async with queue.slot():
            yield 1
            yield 2

    for _ in range(5):
        abandoned = stream()
        assert await anext(abandoned) == 1
        with anyio.fail_after(1):
            await abandoned.aclose()
    slot = await queue.slot().__aenter__()
    assert queue.statistics().in_flight == 1
    del slot
    with anyio.fail_after(1):
        await queue.submit(functools.partial(calls, 0.5))
    assert [o.outcome for o in queue.records().operations][-2:] == ["cancelled", "ok"]
    assert_idle(queue)


async def test_a_drain_ends_when_the_last_slot_is_collected():
    queue = make_queue(1)
    slot = await queue.slot().__aenter__()
    async with anyio.create_task_group() as group:
        group.start_soon(queue.drain, 5)
        await anyio.sleep(1)
        del slot
    assert_idle(queue)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualLoop})], ids=["asyncio"])
async def test_a_slot_that_is_cancelled_between_start_and_wake_up_never_began():
    queue = make_queue(1)
    slot = await queue.slot().__aenter__()
    task = asyncio.create_task(queue.slot().__aenter__())
    await anyio.wait_all_tasks_blocked()
    slot.release()
    assert queue.statistics().in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (queue.statistics().abandoned, queue.statistics().ended[Outcome.IGNORED]) == (1, 0)
    assert_idle(queue)


async def test_map_gives_an_outcome_for_each_item_and_pulls_lazily():
    queue, calls = make_queue(3), Calls()
    pulled = []

    def items():
        for number in range(50):
            pulled.append(number)
            yield number

    async def call(number):
        await calls(1.0)
        if number % 10 == 3:
            raise ValueError(number)
        return number * 2

    seen = {}
    async with queue.map(call, items()) as outcomes:
        async for outcome in outcomes:
            seen[outcome.item] = outcome.result if outcome.error is None else repr(outcome.error)
            assert len(pulled) - len(seen) <= 2 * 3
    assert calls.peak == 3
    assert seen == {n: f"ValueError({n})" if n % 10 == 3 else n * 2 for n in range(50)}
    assert_idle(queue)


async def test_map_in_order():
    queue = make_queue(4)

    async def call(number):
        await anyio.sleep(5 - number % 5)
        return number

    async with queue.map(call, range(20), ordered=True) as outcomes:
        assert [o.unwrap() async for o in outcomes] == list(range(20))


async def test_map_takes_asynchronous_items_and_meta_by_item():
    queue = make_queue(4)

    async def items():
        for number in range(6):
            await anyio.sleep(0.1)
            yield number

    async def call(number):
        await anyio.sleep(1)
        return number

    async with queue.map(call, items(), meta=lambda n: LLMTaskMeta(service_id=f"s{n}")) as outcomes:
        assert sorted([o.unwrap() async for o in outcomes]) == list(range(6))
    assert {o.service_id for o in queue.records().operations} == {f"s{n}" for n in range(6)}


async def test_map_grows_with_the_queue():
    queue, calls = make_queue(1), Calls()
    async with queue.map(lambda _: calls(), range(30)) as outcomes:
        seen = 0
        async for _ in outcomes:
            seen += 1
            if seen == 2:
                queue.resize(5)
            if seen == 20:
                queue.resize(2)
                calls.peak = 0
    assert calls.total == 30
    assert calls.peak <= 5


async def test_leaving_map_early_cancels_what_runs():
    queue, calls = make_queue(3), Calls()
    async with queue.map(lambda _: calls(), range(1000)) as outcomes:
        async for _ in outcomes:
            break
    assert calls.now == 0
    assert calls.total < 12
    assert_idle(queue)


async def test_an_error_in_the_body_of_map_comes_out_as_it_is():
    queue, calls = make_queue(3), Calls()
    with pytest.raises(KeyError, match="mine"):
        async with queue.map(lambda _: calls(), range(1000)) as outcomes:
            async for _ in outcomes:
                raise KeyError("mine")
    assert_idle(queue)


async def test_an_error_of_the_items_comes_after_what_was_pulled():
    queue, calls = make_queue(2), Calls()

    def items():
        yield 1
        yield 2
        raise OSError("disk")

    seen = []
    async with queue.map(lambda n: calls(1.0, n), items()) as outcomes:
        with pytest.raises(OSError, match="disk"):
            async for outcome in outcomes:
                seen += [outcome.result]
    assert sorted(seen) == [1, 2]


async def test_outcomes_are_read_once():
    run = make_queue().map(lambda _: Calls()(), [1])
    async with run as outcomes:
        async for _ in outcomes:
            pass
    with pytest.raises(RuntimeError, match="call map"):
        async with run:
            pass


async def test_plain_async_for_works_on_asyncio_and_says_what_to_do_on_trio(anyio_backend_name):
    queue, calls = make_queue(2), Calls()
    if anyio_backend_name == "trio":
        with pytest.raises(RuntimeError, match="async with"):
            async for _ in queue.map(lambda _: calls(), range(5)):
                pass
        return
    seen = 0
    async for _ in queue.map(lambda _: calls(), range(10)):
        seen += 1
        if seen == 4:
            break
    import gc

    gc.collect()
    await anyio.sleep(5)
    assert (calls.now, queue.open_operations) == (0, 0)
    assert calls.total < 10
    assert_idle(queue)


async def test_submit_sync_refuses_to_block_a_loop():
    with pytest.raises(RuntimeError, match=r"await queue\.submit"):
        make_queue().submit_sync(print)


@pytest.mark.parametrize("name", ["queue_timeout", "request_timeout"])
async def test_time_outs_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be more than 0 seconds"):
        make_queue(**{name: 0})


async def test_a_call_that_sees_a_foreign_cancellation_fails_alone(anyio_backend_name):
    """Its CancelledError is not ours: the item has an error, the others go on."""
    if anyio_backend_name == "trio":
        return  # there a task sees no cancellation but its own
    token = asyncio.create_task(asyncio.sleep(30))
    queue = make_queue(3)

    async def call(number):
        await anyio.sleep(0.01 * number)
        if number == 3:
            token.cancel()
        if number == 5:
            await token
        return number

    for ordered in (False, True):
        seen = {}
        async with queue.map(call, range(20), ordered=ordered) as outcomes:
            async for outcome in outcomes:
                seen[outcome.item] = outcome.error
        assert sorted(seen) == list(range(20))
        assert [n for n, error in seen.items() if isinstance(error, asyncio.CancelledError)] == [5]
    assert_idle(queue)


class Stop(BaseException):
    pass


async def test_what_is_no_ordinary_exception_ends_the_run_and_comes_out():
    queue = make_queue(2)

    async def call(number):
        await anyio.sleep(1)
        if number == 3:
            raise Stop
        return number

    with pytest.raises(Stop):
        async with queue.map(call, range(100)) as outcomes:
            async for _ in outcomes:
                pass
    assert_idle(queue)


async def test_a_call_that_turns_cancellation_into_an_error_does_not_keep_a_run_open(anyio_backend_name):
    if anyio_backend_name == "trio":
        return  # trio forbids to swallow its Cancelled
    queue, started = make_queue(2), []

    async def call(number):
        started.append(number)
        try:
            await anyio.sleep(10)
        except BaseException:
            raise RuntimeError("request aborted") from None

    with anyio.move_on_after(3) as scope:
        async with queue.map(call, range(1000)) as outcomes:
            async for _ in outcomes:
                pass
    assert scope.cancelled_caught
    assert len(started) == 2, "nothing more was started while it closed"
    assert_idle(queue)


class Lazy(Exception):
    """Answers every question with a KeyError, as some RPC errors do."""

    def __getattr__(self, name):
        return {}[name]


@pytest.mark.parametrize("classify", [lambda error: None, lambda error: {}["x"], None])
async def test_no_exception_and_no_classify_costs_a_slot(classify):
    queue = make_queue(1) if classify is None else make_queue(1, classify=classify)

    async def fail():
        raise Lazy

    for retry in (None, Retry(3), 5):
        with pytest.raises(Lazy):
            await queue.submit(fail, retry=retry)
    assert_idle(queue)
    assert {o.outcome for o in queue.records().operations} == {"error"}


async def test_a_long_outage_does_not_overflow():
    queue = make_queue(1)

    async def down():
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        await queue.submit(down, retry=Retry(1200, base=1e-9, cap=1e-9))
    assert_idle(queue)


async def test_a_classify_that_retries_everything_does_not_retry_a_cancellation():
    queue = make_queue(1, classify=lambda error: Verdict(Kind.TRANSIENT))
    with anyio.move_on_after(0.5) as scope:
        await queue.submit(Calls(), retry=Retry(2, base=0, cap=0))
    assert scope.cancelled_caught
    assert len(queue.records().attempts) == 1
    assert_idle(queue)


@pytest.mark.parametrize("meta", [{"rank": None}, {"model_name": ["gpt"]}, {"priority": "high"}])
async def test_bad_metadata_costs_nobody_but_its_caller(meta):
    queue, calls = make_queue(1), Calls()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(queue.submit, calls)
        await anyio.sleep(0.5)
        with pytest.raises(TypeError):
            await queue.submit(calls, meta=LLMTaskMeta(**meta))
        group.start_soon(queue.submit, calls)
    assert calls.total == 4
    await queue.drain(1)
    assert_idle(queue)


async def test_a_hold_is_lifted_on_the_model_it_was_put_on():
    queue = make_queue(1)
    meta = LLMTaskMeta(model_name="big")

    async def fall_back():
        if meta.model_name == "big":
            meta.model_name = "small"
            raise ProviderError("", status_code=429, headers={"retry-after": "1"})

    await queue.submit(fall_back, meta=meta, retry=Retry(3))
    assert queue.statistics().held_keys == ()


async def test_map_uses_a_grown_cap_at_once():
    queue, calls = make_queue(1), Calls()
    grown = []

    async def grow():
        await anyio.sleep(1)
        queue.resize(5)
        await anyio.sleep(1)
        grown.append(calls.now)

    async with anyio.create_task_group() as group:
        group.start_soon(grow)
        async with queue.map(lambda _: calls(60), range(5)) as outcomes:
            assert len([o async for o in outcomes]) == 5
    assert grown == [5]


async def test_a_slot_that_is_never_entered_is_nothing():
    queue = make_queue(1)
    queue.slot()
    assert_idle(queue)
    assert queue.records().operations == []


async def test_a_drain_that_gave_up_leaves_nothing_behind():
    queue, calls = make_queue(1), Calls()
    async with anyio.create_task_group() as group:
        group.start_soon(queue.submit, calls)
        await anyio.sleep(0.5)
        with pytest.raises(QueueTimeout):
            await queue.drain(0.1)
        assert queue._drainers == []


@pytest.mark.parametrize("limit", [2.5, float("nan"), "3"])
async def test_a_cap_is_a_whole_number(limit):
    with pytest.raises(TypeError):
        make_queue(limit)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "slot", "retry", "cancel", "resize", "pause", "resume", "sleep"]),
        st.integers(0, 30),
    ),
    min_size=5,
    max_size=60,
)


@given(steps=STEPS)
@settings(max_examples=60)
async def test_no_slot_is_lost_or_exceeded_whatever_happens(steps):
    """Random calls, errors, cancellations and resizes: the cap holds, and in the end everything is back."""
    queue = make_queue(2, request_timeout=1.7, queue_timeout=6.0)
    scopes = []
    in_flight = 0
    allowed = [2]

    async def call(number):
        nonlocal in_flight
        in_flight += 1
        assert in_flight <= max(allowed[-40:])
        try:
            await anyio.sleep(number % 5 * 0.5)
            if number % 4 == 1:
                raise ProviderError("refused", status_code=429, headers={"retry-after": "1"})
            if number % 4 == 2:
                raise ValueError("mine")
        finally:
            in_flight -= 1

    async def worker(kind, number):
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            try:
                if kind == "slot":
                    async with queue.slot():
                        await call(number)
                else:
                    retry = Retry(3, base=0.5, cap=1) if kind == "retry" else None
                    meta = LLMTaskMeta(model_name="m" if number % 2 else None, priority=Priority(number % 4))
                    await queue.submit(functools.partial(call, number), meta=meta, retry=retry)
            except (ProviderError, ValueError, QueueTimeout, RequestTimeout):
                pass

    async with anyio.create_task_group() as group:
        for kind, number in steps:
            if kind in ("submit", "slot", "retry"):
                group.start_soon(worker, kind, number)
            elif kind == "cancel" and scopes:
                scopes[number % len(scopes)].cancel()
            elif kind == "resize":
                allowed.append(1 + number % 4)
                queue.resize(allowed[-1])
            elif kind == "pause":
                queue.pause()
            elif kind == "resume":
                queue.resume()
            elif kind == "sleep":
                await anyio.sleep(number * 0.1)
            queue._scheduler.check()
        queue.resume()
    assert in_flight == 0
    assert_idle(queue)
    records = queue.records()
    assert len(records.operations) == len({o.operation_id for o in records.operations})
    assert sum(o.attempts for o in records.operations) == len(records.attempts)


async def test_out_of_quota_is_learnt_from_a_slot_too():
    queue = LLMQueue(1)
    error = ProviderError("no", status_code=429, body={"code": "insufficient_quota"})
    meta = LLMTaskMeta(model_name="m")
    with pytest.raises(ProviderError):
        async with queue.slot(meta):
            raise error
    assert "refusals in a row" in error.__notes__[0]
    with pytest.raises(OutOfQuotaError):
        async with queue.slot(meta):
            pass
