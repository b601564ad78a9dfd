"""What refusals do to the others of a model: held back, spread, given up, out of quota. Virtual time, both backends."""

import functools

import anyio
import httpx2
import pytest

import llmq
from llmq import Drop, LLMQueue, LLMTaskMeta, Retry
from llmq.core.breaker import LONGEST_PAUSE_SECONDS, QUOTA_SECONDS, RESERVE
from llmq.errors import OutOfQuotaError, ProviderError

pytestmark = pytest.mark.anyio

BIG = LLMTaskMeta(model_name="big")
SMALL = LLMTaskMeta(model_name="small")


def refusal(retry_after=None, **body):
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return ProviderError("refused", status_code=429, headers=headers, body=body or {"type": "requests"})


def spent():
    return ProviderError("refused", status_code=429, body={"code": "insufficient_quota"})


class Calls:
    """A call that notes when it starts, and is refused as often as `refusals` says."""

    def __init__(self, *refusals, seconds=0.5, refused_after=0.0):
        self.refusals = list(refusals)
        self.seconds = seconds
        self.refused_after = refused_after
        self.starts = []

    async def __call__(self):
        self.starts.append(anyio.current_time())
        if self.refusals:
            refusal = self.refusals.pop(0)
            await anyio.sleep(self.refused_after)
            raise refusal
        await anyio.sleep(self.seconds)


class Refusing(httpx2.AsyncBaseTransport):
    """Refuses the first request with a Retry-After; a client's own retry is let in."""

    def __init__(self, retry_after):
        self.retry_after = retry_after

    async def handle_async_request(self, request):
        retry_after, self.retry_after = self.retry_after, None
        if retry_after is None:
            return httpx2.Response(200, json={"ok": True})
        return httpx2.Response(429, headers={"retry-after": str(retry_after)}, json={"error": {"type": "requests"}})


def submit_all(group, queue, calls, count, meta=BIG, **options):
    for _ in range(count):
        group.start_soon(functools.partial(queue.submit, calls, meta=meta, **options))


def seconds_since(start, calls):
    return [round(at - start, 3) for at in calls.starts]


@pytest.mark.parametrize("seen", [True, False])
async def test_a_hidden_refusal_that_was_seen_holds_back_the_others_of_its_model(seen):
    """The client sleeps in its slot, and comes back by itself; nobody has raised anything."""
    queue, big, small = LLMQueue(2, telemetry=None), Calls(), Calls()
    transport = llmq.AsyncTransport(Refusing(10)) if seen else Refusing(10)
    start = anyio.current_time()
    async with httpx2.AsyncClient(transport=transport) as client:

        async def retries_by_itself():
            response = await client.get("http://provider/")
            if response.status_code == 429:
                await anyio.sleep(float(response.headers["retry-after"]))
                response = await client.get("http://provider/")
            return response.status_code

        async with anyio.create_task_group() as group:
            async with queue.slot(SMALL):
                group.start_soon(functools.partial(queue.submit, retries_by_itself, meta=BIG))
                await anyio.wait_all_tasks_blocked()
                submit_all(group, queue, big, 1)
                submit_all(group, queue, small, 1, SMALL)
                await anyio.wait_all_tasks_blocked()
    assert small.starts[0] - start < 1, "another model goes on"
    assert big.starts[0] - start >= (10 if seen else 0)
    if seen:
        assert [(a.outcome, a.resent) for a in queue.records().attempts if a.seen] == [
            ("rejected", False),
            ("ok", True),
        ]
    else:
        assert big.starts[0] - start < 1


async def test_a_refused_call_comes_back_before_those_who_were_held_back_for_it():
    queue = LLMQueue(1, telemetry=None)
    order = []

    async def call(name):
        order.append(name)
        if order == ["first"]:
            raise refusal(10)

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        for name in ("first", "second", "third"):
            group.start_soon(
                functools.partial(queue.submit, functools.partial(call, name), meta=BIG, retry=Retry(3, base=0))
            )
            await anyio.wait_all_tasks_blocked()
    assert order == ["first", "first", "second", "third"]
    assert anyio.current_time() - start == pytest.approx(10 + 2.0, abs=0.1), "at the time, and then one a second"


async def test_a_concurrency_refusal_that_says_a_minute_holds_for_one_call():
    queue = LLMQueue(1, telemetry=None)
    await queue.submit(functools.partial(anyio.sleep, 3.0), meta=BIG)
    calls = Calls(refusal(60, code="concurrency_limit_exceeded"))
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        submit_all(group, queue, calls, 2, retry=Retry(2, base=0))
    first, again, other = seconds_since(start, calls)
    assert first == 0
    assert 3.0 <= again < other < 6.0, "as long as calls of this model run"
    assert queue.records().attempts[1].retry_after_seconds == 60, "recorded as it was said"


async def test_a_rate_refusal_that_says_a_minute_holds_for_a_minute():
    queue, calls = LLMQueue(1, telemetry=None), Calls(refusal(60))
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        submit_all(group, queue, calls, 2, retry=Retry(2, base=0))
    assert all(at >= 60 for at in seconds_since(start, calls)[1:])


async def test_after_a_hold_no_herd_comes():
    queue = LLMQueue(10, telemetry=None)
    calls = Calls(*[refusal(5) for _ in range(10)], refused_after=0.1)
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        submit_all(group, queue, calls, 40, retry=Retry(3))
    starts = seconds_since(start, calls)
    assert starts[:10] == [0] * 10
    held = starts[10:]
    assert min(held) >= 5, "nobody before it was over"
    assert len([at for at in held if at < held[0] + 0.45]) <= 5, "over a second, and not all ten slots at once"
    assert max(held.count(at) for at in held if at < held[0] + 0.45) == 1


async def test_a_provider_that_refuses_everything_gets_so_many_retries_and_no_more():
    queue = LLMQueue(20, telemetry=None)
    calls = Calls(*[refusal() for _ in range(5000)])
    errors = []

    async def one():
        try:
            await queue.submit(calls, meta=BIG, retry=Retry(5))
        except ProviderError as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(150):
            group.start_soon(one)
    assert len(errors) == 150
    assert len(calls.starts) == 150 + RESERVE
    notes = [" ".join(error.__notes__) for error in errors]
    assert all("model big" in note and "refusals in a row" in note and "limit on requests" in note for note in notes)
    assert "its retry budget is spent" in notes[-1]
    gaps = [after - before for before, after in zip(calls.starts, calls.starts[1:], strict=False)]
    assert max(gaps) == pytest.approx(LONGEST_PAUSE_SECONDS, rel=0.1), "longer and longer pauses"
    assert queue.records().attempts[-1].outcome == "rejected"


async def test_a_success_ends_the_pauses_and_pays_for_retries():
    queue = LLMQueue(1, telemetry=None)
    refusing = Calls(*[refusal() for _ in range(5000)])
    for _ in range(int(RESERVE) + 3):
        with pytest.raises(ProviderError):
            await queue.submit(refusing, meta=BIG, retry=Retry(2, base=0))
    assert len(refusing.starts) == 2 * RESERVE + 3
    await queue.submit(Calls(), meta=BIG)
    await anyio.sleep(1)  # the starts after a pause are spread
    start, calls = anyio.current_time(), Calls(refusal())
    await queue.submit(calls, meta=BIG, retry=Retry(2, base=0))
    assert seconds_since(start, calls) == [0, 0]


async def test_the_retries_of_one_model_are_not_those_of_another():
    queue = LLMQueue(1, telemetry=None)
    for _ in range(int(RESERVE) + 1):
        with pytest.raises(ProviderError):
            await queue.submit(Calls(refusal(), refusal()), meta=BIG, retry=Retry(2, base=0))
    calls = Calls(refusal())
    await queue.submit(calls, meta=SMALL, retry=Retry(2, base=0))
    assert len(calls.starts) == 2


async def test_refusals_that_come_and_go_are_retried_on_and_on():
    queue = LLMQueue(1, telemetry=None)
    for _ in range(300):
        await queue.submit(Calls(refusal(), refusal(), seconds=0), meta=BIG, retry=Retry(3, base=0.01))
    assert len(queue.records().attempts) == 900


async def test_out_of_quota_ends_the_calls_of_that_model_and_of_no_other():
    queue, big, small = LLMQueue(1, telemetry=None), Calls(), Calls()
    outcomes = []

    async def one(calls, meta):
        try:
            await queue.submit(calls, meta=meta, retry=Retry(5))
            outcomes.append((meta.model_name, "ok"))
        except (ProviderError, OutOfQuotaError) as error:
            outcomes.append((meta.model_name, type(error).__name__))

    async def out_of_money():
        await anyio.sleep(1)
        raise spent()

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(one, out_of_money, BIG)
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            group.start_soon(one, big, BIG)
        group.start_soon(one, small, SMALL)
    assert anyio.current_time() - start == pytest.approx(1.5), "at once, with no retry"
    assert sorted(outcomes) == [("big", "OutOfQuotaError")] * 3 + [("big", "ProviderError"), ("small", "ok")]
    assert big.starts == []

    with pytest.raises(OutOfQuotaError, match=r"quota of model big is used up .* billing"):
        await queue.submit(big, meta=BIG)
    await queue.submit(small, meta=SMALL)
    await anyio.sleep(QUOTA_SECONDS)
    await queue.submit(big, meta=BIG)
    assert len(big.starts) == 1
    found = queue.statistics()
    assert (found.in_flight, found.waiting, queue.open_operations) == (0, 0, 0)
    outcomes = [o.outcome for o in queue.records().operations if o.model_name == "big"]
    assert sorted(outcomes) == ["dropped"] * 4 + ["ok", "rejected"]


async def test_a_call_that_sleeps_before_its_next_attempt_hears_of_the_quota_at_once():
    queue, calls = LLMQueue(2, telemetry=None), Calls(refusal(30), seconds=1)
    start = anyio.current_time()

    async def out_of_money():
        await anyio.sleep(2)
        raise spent()

    async with anyio.create_task_group() as group:
        group.start_soon(expect, ProviderError, functools.partial(queue.submit, out_of_money, meta=BIG))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(OutOfQuotaError, match="quota of model big"):
            await queue.submit(calls, meta=BIG, retry=Retry(5))
        assert anyio.current_time() - start == pytest.approx(2)
    assert len(calls.starts) == 1
    assert queue.open_operations == 0


async def expect(kind, call):
    with pytest.raises(kind):
        await call()


async def test_a_budget_that_is_used_up_turns_away_those_who_wait_and_those_who_come():
    queue = LLMQueue(2, telemetry=None, ledger=llmq.Ledger(budgets=[llmq.Budget(tokens=100)]))
    started, ends = [], []

    async def call(number):
        started.append(number)
        await anyio.sleep(len(started))
        return {"usage": {"input_tokens": 60, "output_tokens": 60}}

    async def one(number):
        try:
            await queue.submit(functools.partial(call, number), meta=BIG)
            ends.append("ok")
        except llmq.BudgetExceededError as error:
            ends.append("no budget" if "100 tokens per run" in str(error) else str(error))

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(one, number)
    with pytest.raises(llmq.BudgetExceededError):
        await queue.submit(functools.partial(call, 9), meta=BIG)
    assert len(started) == 2, "nobody starts once it is used up"
    assert ends == ["ok", "no budget", "no budget", "no budget", "ok"], "and who runs goes on to the end"
    statistics = queue.statistics()
    assert statistics.dropped[Drop.BUDGET] + statistics.abandoned == 3
    assert statistics.dropped[Drop.BUDGET] == 2, "one had its slot already, and gave it back"
    assert (queue.statistics().in_flight, queue.open_operations) == (0, 0)


async def test_calls_that_are_refused_together_are_one_sign_and_a_provider_that_recovers_is_found():
    queue = LLMQueue(64, telemetry=None)
    start = anyio.current_time()
    done = []

    async def call():
        await anyio.sleep(0.1)
        if anyio.current_time() - start < 2:
            raise refusal()
        done.append(anyio.current_time() - start)

    async with queue.map(lambda _: call(), range(500), meta=BIG, retry=Retry(6, base=0.1)) as outcomes:
        async for _ in outcomes:
            pass
    assert done[0] < 6, "2 s of refusals cost some more, not a minute"
    assert (queue.statistics().in_flight, queue.open_operations) == (0, 0)


async def test_no_retry_after_stops_a_model_for_good():
    queue, calls = LLMQueue(1, telemetry=None), Calls(refusal(1e30))
    start = anyio.current_time()
    with pytest.raises(ProviderError):
        await queue.submit(calls, meta=BIG)
    await queue.submit(calls, meta=BIG)
    assert anyio.current_time() - start < 3700
