"""State changes on the logger `llmq`: which, how loud, and with which fields."""

import logging

import anyio
import pytest

from llmq import Budget, Ledger, LLMQueue, LLMTaskMeta, Retry, report_tokens
from llmq.errors import BudgetExceededError, ProviderError

pytestmark = pytest.mark.anyio

META = LLMTaskMeta(model_name="m")


@pytest.fixture
def told(caplog):
    """(level, event) of what was logged since it was last asked."""
    caplog.set_level(logging.DEBUG, "llmq")

    def found():
        rows = [(record.levelname, record.event) for record in caplog.records]
        caplog.clear()
        return rows

    return found


def refusal(**body):
    return ProviderError("no sk-1", status_code=429, headers=body.pop("headers", {}), body=body)


async def raises(error):
    raise error


async def answer():
    await anyio.sleep(1)


async def test_changes_of_the_whole_queue_are_told_with_its_counts(told, caplog):
    queue = LLMQueue(2, telemetry=None)
    queue.pause()
    queue.resume()
    queue.resize(3)
    record = caplog.records[-1]
    assert record.getMessage() == "queue resized: 0 of 3 in flight, 0 waiting"
    assert (record.in_flight, record.waiting, record.limit) == (0, 0, 3)
    queue.reconfigure(max_queued=5)
    await queue.drain()
    queue.close()
    events = ["paused", "resumed", "resized", "reconfigured", "draining", "closed"]
    assert told() == [("INFO", event) for event in events]


async def test_single_calls_are_not_told(told):
    queue = LLMQueue(1)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(queue.submit, answer)
    with pytest.raises(ValueError, match="wrong"):
        await queue.submit(lambda: raises(ValueError("wrong")))
    queue.cancel()
    assert told() == []


async def test_a_hold_is_told_with_its_seconds(told, caplog):
    queue = LLMQueue(1)
    with pytest.raises(ProviderError):
        await queue.submit(lambda: raises(refusal(type="requests", headers={"retry-after": "2"})), meta=META)
    (record,) = caplog.records
    assert record.getMessage() == "model m refused (limit on requests): its calls are held back for 2.0 s"
    assert (record.model_name, record.limit_type, record.seconds) == ("m", "requests", 2.0)
    assert told() == [("INFO", "held")]
    with pytest.raises(ProviderError):
        await queue.submit(lambda: raises(refusal(type="requests")), meta=META)
    assert told() == [], "nobody was held back"


async def test_what_is_wrong_with_a_provider_is_a_warning(told, caplog):
    queue = LLMQueue(1)
    queue._refusals._breaker("m")._budget = 0.0
    with pytest.raises(ProviderError):
        await queue.submit(lambda: raises(refusal()), meta=META, retry=Retry(3))
    assert caplog.records[0].seconds == 1.0
    assert told() == [("WARNING", "breaker")]
    with pytest.raises(ProviderError):
        await queue.submit(lambda: raises(refusal(code="insufficient_quota")), meta=LLMTaskMeta(model_name="n"))
    assert told() == [("WARNING", "quota")]


async def test_a_budget_is_a_warning_at_80_percent_and_an_error_when_it_is_used_up(told, caplog):
    queue = LLMQueue(1, ledger=Ledger(budgets=[Budget(tokens=10)]))

    async def use():
        report_tokens(1)

    for _ in range(10):
        await queue.submit(use)
    assert [record.share for record in caplog.records] == [0.8, 1.0]
    assert told() == [("WARNING", "budget"), ("ERROR", "budget")]
    with pytest.raises(BudgetExceededError):
        await queue.submit(use)
    assert told() == [], "each once"


async def test_a_client_that_retries_unseen_is_a_warning(told):
    class Answer:
        retries_taken = 2

    async def call():
        return Answer()

    queue = LLMQueue(1)
    await queue.submit(call)
    await queue.submit(call)
    assert told() == [("WARNING", "hidden_retries")]


async def test_the_current_span_is_named(captured, caplog):
    caplog.set_level(logging.INFO, "llmq")
    c = captured()
    with c.tracer.start_as_current_span("caller") as span:
        c.queue.pause()
        c.queue.resume()
        with pytest.raises(ProviderError):
            await c.queue.submit(lambda: raises(refusal(headers={"retry-after": "2"})))
    c.queue.resize(2)
    paused, _, held, resized = caplog.records
    context = span.get_span_context()
    assert (paused.trace_id, paused.span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert held.trace_id == paused.trace_id
    assert held.span_id == f"{c.spans()[1].context.span_id:016x}", "of the call that was refused"
    assert not hasattr(resized, "trace_id")


async def test_nothing_is_made_where_nobody_listens(monkeypatch):
    logging.getLogger("llmq").setLevel(logging.WARNING)
    monkeypatch.setattr("llmq.logs.current_ids", lambda: pytest.fail("made for nobody"))
    try:
        LLMQueue(1).pause()
    finally:
        logging.getLogger("llmq").setLevel(logging.NOTSET)
