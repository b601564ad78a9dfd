"""What a user's exporters get: exact spans and points, whatever becomes of a call."""

import asyncio
import functools
import gc
import json
import random

import aiohttp
import anyio
import anyio.from_thread
import httpx2
import pytest
from aiohttp import web
from opentelemetry import trace

import llmq
from llmq import (
    AsyncTransport,
    Budget,
    Cap,
    Ledger,
    LLMQueue,
    LLMTaskMeta,
    Outcome,
    Priority,
    Rate,
    Retry,
    RuntimeEnv,
    Settings,
)
from llmq.errors import LLMQError, ProviderError, QueueError, QueueFullError
from llmq.telemetry import MAX_VALUES, SECONDS_BUCKETS, Telemetry, stage_attributes
from llmq.wire.sent import current

pytestmark = pytest.mark.anyio

META = LLMTaskMeta("features_3", "m", "service-1", "request-1")
TOLD = {"stage": "features", "plateau": 3, "model_name": "m", "service_id": "service-1", "request_id": "request-1"}
QUEUED, GOT_SLOT = ("queued", {"position": 0}), ("slot", {"attempt": 1})
BASE = "model_name=m {}plateau=3 queue=q stage=features"
ASKED = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
OF_ASKED = "gen_ai.operation.name=chat gen_ai.request.model=m"


async def sleep(seconds=1.0):
    await anyio.sleep(seconds)


def operation(outcome="ok", *events, told=TOLD, attempts=1, wait=0.0, error=None, position=0):
    """The row of an operation's span."""
    entry = {"position_at_entry": position}
    attributes = {**told, **entry, "attempts": attempts, "wait_seconds": wait, "outcome": outcome}
    if error is not None:
        attributes["error.type"] = error
    return 0, "llm_queue.submit", "INTERNAL", attributes, list(events), "UNSET" if error is None else "ERROR"


def attempt(name="chat m", told=ASKED, **more):
    """The row of an attempt's span."""
    attributes = {**told, **{key.replace("__", "."): value for key, value in more.items()}}
    return 1, name, "CLIENT", attributes, [], "ERROR" if "error.type" in attributes else "UNSET"


WAITED = (1, "llm_queue.wait", "INTERNAL", {}, [], "UNSET")


def counted(outcomes, submitted=None, base=BASE):
    """The points that every call leaves."""
    plain = base.format("")
    return {
        "llm_queue_inflight": {plain: 0},
        "llm_queue_submitted": {plain: submitted or sum(outcomes.values())},
        "llm_queue_completed": {base.format(f"outcome={name} "): count for name, count in outcomes.items()},
    }


def by_outcome(points, base=BASE, error=""):
    return {f"{error}{base.format(f'outcome={name} ')}": value for name, value in points.items()}


AT_ENTRY = "llm_queue_depth_at_entry"
OF_REQUEST = "gen_ai.client.operation.duration"
NORMAL = "priority=normal queue=q"


async def test_a_plain_call(captured):
    c = captured()
    await c.queue.submit(sleep, meta=META)
    assert c.trees() == [operation(), attempt()]
    assert c.metrics() == {
        **counted({"ok": 1}),
        AT_ENTRY: {NORMAL: (1, 0)},
        "llm_queue_wait": by_outcome({"ok": (1, 0)}),
        "llm_queue_duration": by_outcome({"ok": (1, 1)}),
        OF_REQUEST: {OF_ASKED: (1, 1)},
    }


async def test_a_waiting_call_and_the_state_while_it_waits(captured):
    c = captured(limits=[Cap(2, by="model_name", overrides={"m": 1, "other": 3}), Cap(5)])
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(functools.partial(c.queue.submit, sleep, meta=META))
            await anyio.sleep(0.25)
        state = c.metrics(idle=True)
    assert state["llm_queue_inflight"] == {BASE.format(""): 1}
    assert state["llm_queue_depth"] == {
        NORMAL: 2, "priority=high queue=q": 0, "priority=low queue=q": 0, "priority=urgent queue=q": 0,
    }  # fmt: skip
    assert state["llm_queue_limit"] == {
        "queue=q": 1,
        "key=model_name queue=q": 2,
        "key=model_name=m queue=q": 1,
        "key=model_name=other queue=q": 3,
        "key=cap queue=q": 5,
    }
    assert c.trees() == [
        operation(),
        attempt(),
        operation("ok", QUEUED, GOT_SLOT, wait=0.75),
        WAITED,
        attempt(),
        operation("ok", ("queued", {"position": 1}), GOT_SLOT, wait=1.5, position=1),
        WAITED,
        attempt(),
    ]
    after = c.metrics()
    assert after.pop("llm_queue_limit") == state["llm_queue_limit"]
    assert after == {
        **counted({"ok": 3}),
        AT_ENTRY: {NORMAL: (3, 1)},
        "llm_queue_wait": by_outcome({"ok": (3, 2.25)}),
        "llm_queue_duration": by_outcome({"ok": (3, 5.25)}),
        "llm_queue_loop_lag": {"": (2, 0)},
        OF_REQUEST: {OF_ASKED: (3, 3)},
    }


async def test_depth_is_counted_by_class(captured):
    c = captured()
    async with anyio.create_task_group() as group:
        for priority in Priority:
            group.start_soon(functools.partial(c.queue.submit, sleep, meta=LLMTaskMeta(priority=priority)))
        await anyio.sleep(0.5)
        assert sum(c.metrics()["llm_queue_depth"].values()) == 3
    entries = c.metrics()[AT_ENTRY]
    assert {key: count for key, (count, _) in entries.items()} == {
        f"priority={name} queue=q": 1 for name in ("urgent", "high", "normal", "low")
    }
    assert sum(depth for _, depth in entries.values()) == 0 + 0 + 1 + 2


@pytest.mark.parametrize(("headers", "source", "delay"), [({"retry-after": "2"}, "retry_after", 2), ({}, "backoff", 0)])
async def test_a_refused_call_that_is_tried_again(captured, headers, source, delay):
    c = captured()
    calls = []

    async def refused_once():
        calls.append(1)
        await anyio.sleep(0.5)
        if len(calls) == 1:
            raise ProviderError("slow down", status_code=429, headers=headers, body={"type": "requests"})

    await c.queue.submit(refused_once, meta=META, retry=Retry(2, base=0))
    said = {"llm_queue__retry_after_seconds": 2.0} if headers else {}
    assert c.trees() == [
        operation(attempts=2),
        attempt(http__response__status_code=429, llm_queue__limit_type="requests", error__type="ProviderError", **said),
        attempt(**{"http.request.resend_count": 1}),
    ]
    assert c.metrics() == {
        **counted({"ok": 1}),
        AT_ENTRY: {NORMAL: (2, 0)},
        "llm_queue_wait": by_outcome({"ok": (1, 0), "rejected": (1, 0)}),
        "llm_queue_duration": by_outcome({"ok": (1, 1 + delay)}),
        "llm_queue_rate_limited": {f"limit_type=requests model_name=m queue=q retry_after={bool(headers)}": 1},
        "llm_queue_retry_delay": {f"queue=q source={source}": (1, delay)},
        OF_REQUEST: {OF_ASKED: (1, 0.5), f"error.type=ProviderError {OF_ASKED}": (1, 0.5)},
    }


async def test_a_cancelled_waiter_was_never_in_flight(captured, anyio_backend_name):
    c = captured()
    name = "CancelledError" if anyio_backend_name == "asyncio" else "Cancelled"
    async with c.queue.slot(META):
        with anyio.move_on_after(1):
            await c.queue.submit(sleep, meta=META)
        assert c.trees() == [operation("cancelled", QUEUED, wait=1.0, error=name), WAITED]
    assert c.metrics() == {
        **counted({"ok": 1, "cancelled": 1}),
        AT_ENTRY: {NORMAL: (2, 0)},
        "llm_queue_wait": by_outcome({"ok": (1, 0), "cancelled": (1, 1)}),
        "llm_queue_duration": {
            **by_outcome({"ok": (1, 1)}),
            **by_outcome({"cancelled": (1, 1)}, error=f"error.type={name} "),
        },
        OF_REQUEST: {OF_ASKED: (1, 1)},
    }


def event(text=None, *, finish=None, **more):
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    found = {"object": "chat.completion.chunk", "model": "m-2026", "choices": choices, **more}
    return b"data: " + json.dumps(found).encode() + b"\n\n"


USED = {"prompt_tokens": 7, "completion_tokens": 3}
STREAM = [
    (0.25, event("a")),
    (0.5, event("b")),
    (1, event("c", finish="stop")),
    (0, event(usage=USED)),
    (0, b"data: [DONE]\n\n"),
]


class Provider(httpx2.AsyncBaseTransport):
    """Answers with (seconds to sleep, bytes); what it got is in `requests`."""

    def __init__(self, *pieces, status=200, kind="text/event-stream", **headers):
        self.pieces, self.status, self.requests = pieces, status, []
        self.headers = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}

    async def handle_async_request(self, request):
        self.requests.append(request)
        await anyio.sleep(0.5)
        return httpx2.Response(self.status, headers=self.headers, stream=Pieces(self.pieces))

    def client(self):
        return httpx2.AsyncClient(transport=AsyncTransport(self))


class Pieces(httpx2.AsyncByteStream):
    def __init__(self, pieces):
        self.pieces = pieces

    async def __aiter__(self):
        for seconds, piece in self.pieces:
            await anyio.sleep(seconds)
            yield piece


URL = "https://api.openai.com/v1/chat/completions"
SEEN = {**ASKED, "gen_ai.provider.name": "openai", "server.address": "api.openai.com"}


def of_seen(**more):
    found = {**SEEN, **{name.replace("__", "."): value for name, value in more.items()}}
    return " ".join(f"{name}={value}" for name, value in sorted(found.items()))


async def test_a_stream_lasts_until_its_last_byte(captured):
    c = captured()
    provider = Provider(*STREAM, x_ratelimit_limit_requests="60", x_ratelimit_remaining_requests="59")
    async with provider.client() as client:

        async def call():
            async with client.stream("POST", URL, json={}) as response:
                return [piece async for piece in response.aiter_bytes()]

        await c.queue.submit(call, meta=META)
    told = {"http.response.status_code": 200, "gen_ai.response.model": "m-2026"}
    told |= {"gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 3}
    assert c.trees() == [operation(), attempt(told={**SEEN, **told})]
    answered = of_seen(gen_ai__response__model="m-2026")
    assert c.metrics() == {
        **counted({"ok": 1}),
        AT_ENTRY: {NORMAL: (1, 0)},
        "llm_queue_wait": by_outcome({"ok": (1, 0)}),
        "llm_queue_duration": by_outcome({"ok": (1, 2.25)}),
        "llm_queue_ratelimit_limit": {"dimension=requests model_name=m": 60},
        "llm_queue_ratelimit_remaining": {"dimension=requests model_name=m": 59},
        OF_REQUEST: {answered: (1, 2.25)},
        "gen_ai.client.operation.time_to_first_chunk": {answered: (1, 0.75)},
        "gen_ai.client.operation.time_per_output_chunk": {answered: (4, 1.5)},
        "gen_ai.client.token.usage": {
            of_seen(gen_ai__response__model="m-2026", gen_ai__token__type="input"): (1, 7),
            of_seen(gen_ai__response__model="m-2026", gen_ai__token__type="output"): (1, 3),
        },
    }
    span = c.spans()[1].context
    assert provider.requests[0].headers["traceparent"].startswith(f"00-{span.trace_id:032x}-{span.span_id:016x}-")


@pytest.mark.filterwarnings("ignore:.*was garbage collected")  # httpx2's own generators, on trio
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("read", ["in the call", "after it"])
async def test_a_stream_that_is_aborted_ends_there(captured, read):
    c = captured()
    async with Provider(*STREAM).client() as client:

        async def call():
            response = await client.send(client.build_request("POST", URL, json={}), stream=True)
            if read == "in the call":
                await abort(response)
            return response

        async def abort(response):
            async for _ in response.aiter_raw():
                break
            await response.aclose()

        response = await c.queue.submit(call, meta=META)
        if read == "after it":
            assert c.metrics()["llm_queue_inflight"] == {BASE.format(""): 1}, "it holds its slot as long as it is read"
            assert trace.get_current_span() is trace.INVALID_SPAN
            await abort(response)
    given_up = {"http__response__status_code": 200, "error__type": "abandoned"}
    inside = read == "in the call"
    outcome = "ok" if inside else "cancelled"
    points = c.metrics()
    assert points == {
        **counted({outcome: 1}),
        AT_ENTRY: {NORMAL: (1, 0)},
        "llm_queue_wait": by_outcome({outcome: (1, 0)}),
        "llm_queue_duration": by_outcome({outcome: (1, 0.75)}, error="" if inside else "error.type=abandoned "),
        OF_REQUEST: {of_seen(error__type="abandoned"): (1, 0.75)},
        "gen_ai.client.operation.time_to_first_chunk": {of_seen(error__type="abandoned"): (1, 0.75)},
    }
    assert c.trees() == [operation(outcome, error=None if inside else "abandoned"), attempt(told=SEEN, **given_up)]


async def test_a_refusal_that_the_call_gets_over_is_still_counted(captured):
    c = captured()
    body = json.dumps({"error": {"type": "tokens"}}).encode()
    provider = Provider((0, body), status=429, kind="application/json", retry_after="0")
    async with provider.client() as client:

        async def call():
            return (await client.post(URL, json={})).status_code

        assert await c.queue.submit(call, meta=META) == 429
    told = {"http__response__status_code": 429, "llm_queue__limit_type": "tokens", "error__type": "429"}
    assert c.trees() == [operation(), attempt(told=SEEN, **told, llm_queue__retry_after_seconds=0.0)]
    assert c.metrics() == {
        **counted({"ok": 1}),
        AT_ENTRY: {NORMAL: (1, 0)},
        "llm_queue_wait": by_outcome({"ok": (1, 0)}),
        "llm_queue_duration": by_outcome({"ok": (1, 0.5)}),
        "llm_queue_rate_limited": {"limit_type=tokens model_name=m queue=q retry_after=True": 1},
        OF_REQUEST: {of_seen(error__type="429"): (1, 0.5)},
    }


async def test_time_outs_in_the_queue_and_in_the_slot(captured):
    c = captured(request_timeout=0.5, queue_timeout=0.25)

    async def one():
        with pytest.raises(TimeoutError):
            await c.queue.submit(sleep, meta=META)

    async with anyio.create_task_group() as group:
        group.start_soon(one)
        await anyio.sleep(0.125)
        group.start_soon(one)
    assert c.trees() == [
        operation("timeout", error="RequestTimeout"),
        attempt(error__type="RequestTimeout"),
        operation("timeout", QUEUED, wait=0.25, error="QueueTimeout"),
        WAITED,
    ]
    assert c.metrics() == {
        **counted({"timeout": 2}),
        AT_ENTRY: {NORMAL: (2, 0)},
        "llm_queue_wait": by_outcome({"timeout": (2, 0.25)}),
        "llm_queue_duration": {
            **by_outcome({"timeout": (1, 0.5)}, error="error.type=RequestTimeout "),
            **by_outcome({"timeout": (1, 0.25)}, error="error.type=QueueTimeout "),
        },
        OF_REQUEST: {f"error.type=RequestTimeout {OF_ASKED}": (1, 0.5)},
    }


@pytest.mark.parametrize(
    ("why", "error", "outcome"),
    [
        ("full", "QueueFullError", "queue_full"),
        ("draining", "QueueDrainingError", "dropped"),
        ("closed", "QueueClosedError", "dropped"),
        ("budget", "BudgetExceededError", "dropped"),
        ("quota", "OutOfQuotaError", "dropped"),
    ],
)
async def test_a_call_refused_at_the_door(captured, why, error, outcome):
    c = captured(
        ledger=Ledger(budgets=[Budget(tokens=10)]) if why == "budget" else None,
        max_queued=0 if why == "full" else None,
        overflow="reject",
    )

    async def spend():
        llmq.report_tokens(10)

    async def no_money():
        raise ProviderError("no", status_code=429, body={"code": "insufficient_quota"})

    holder = c.queue.slot()
    before = LLMTaskMeta(model_name="m")
    match why:
        case "full":
            await holder.__aenter__()
        case "draining":
            await c.queue.drain()
        case "closed":
            c.queue.close()
        case "budget":
            await c.queue.submit(spend, meta=before)
        case "quota":
            with pytest.raises(ProviderError):
                await c.queue.submit(no_money, meta=before)
    earlier, at_entry = len(c.trees()), c.metrics().get(AT_ENTRY, {NORMAL: (0, 0)})[NORMAL][0]
    with pytest.raises(QueueError) as caught:
        await c.queue.submit(sleep, meta=META)
    assert type(caught.value).__name__ == error
    asked = why not in ("budget", "quota")
    assert c.trees()[earlier:] == [operation(outcome, error=error)]
    mine = {name: {k: v for k, v in points.items() if "stage=" in k} for name, points in c.metrics().items()}
    assert {name: points for name, points in mine.items() if points} == {
        **counted({outcome: 1}),
        "llm_queue_wait": by_outcome({outcome: (1, 0)}),
        "llm_queue_duration": by_outcome({outcome: (1, 0)}, error=f"error.type={error} "),
    }
    assert c.metrics().get(AT_ENTRY, {NORMAL: (0, 0)})[NORMAL] == (at_entry + asked, 0)
    ids = [record.operation_id for record in c.queue.records().operations]
    assert all(ids)
    assert len(set(ids)) == len(ids), "also of calls that never came in"
    if why == "full":
        await holder.__aexit__(None, None, None)


async def test_a_slot_with_metadata(captured):
    c = captured()
    async with c.queue.slot(META):
        await anyio.sleep(1)
        assert trace.get_current_span() is trace.INVALID_SPAN, "a slot may be left in another task: nothing is attached"
    assert c.trees() == [operation(), attempt()]
    assert c.metrics() == {
        **counted({"ok": 1}),
        AT_ENTRY: {NORMAL: (1, 0)},
        "llm_queue_wait": by_outcome({"ok": (1, 0)}),
        "llm_queue_duration": by_outcome({"ok": (1, 1)}),
        OF_REQUEST: {OF_ASKED: (1, 1)},
    }


async def test_a_slot_that_is_dropped_is_counted_by_the_next_collection(captured, caplog):
    c = captured()
    slot = c.queue.slot(META)
    await slot.__aenter__()
    await anyio.sleep(1)
    del slot
    gc.collect()
    await anyio.sleep(5)
    assert c.metrics()["llm_queue_inflight"] == {BASE.format(""): 0}, "though nobody has called since"
    assert c.trees() == [operation("cancelled", error="abandoned"), attempt(error__type="abandoned")]
    assert c.metrics() == {
        **counted({"cancelled": 1}),
        AT_ENTRY: {NORMAL: (1, 0)},
        "llm_queue_wait": by_outcome({"cancelled": (1, 0)}),
        "llm_queue_duration": by_outcome({"cancelled": (1, 1)}, error="error.type=abandoned "),
        OF_REQUEST: {f"error.type=abandoned {OF_ASKED}": (1, 1)},
    }
    (record,) = caplog.records
    assert record.event == "leaked"


def test_submit_sync_from_a_thread(captured):
    c = captured()
    with c.tracer.start_as_current_span("caller"):
        assert c.queue.submit_sync(lambda: trace.get_current_span().name, meta=META) == "llm_queue.submit"
        assert trace.get_current_span().name == "caller"
        with pytest.raises(KeyError):
            c.queue.submit_sync({}.__getitem__, "no", meta=META)
        assert trace.get_current_span().name == "caller"
    names = ["caller", "  llm_queue.submit", "    chat m", "  llm_queue.submit", "    chat m"]
    assert c.names() == names
    found = c.metrics()
    assert {name: found[name] for name in counted({})} == counted({"ok": 1, "error": 1})
    counts = {name: {k: v[0] for k, v in found[name].items()} for name in set(found) - set(counted({}))}
    failed = "error.type=KeyError "
    assert counts == {
        AT_ENTRY: {NORMAL: 2},
        "llm_queue_wait": by_outcome({"ok": 1, "error": 1}),
        "llm_queue_duration": {**by_outcome({"ok": 1}), **by_outcome({"error": 1}, error=failed)},
        OF_REQUEST: {OF_ASKED: 1, f"{failed}{OF_ASKED}": 1},
    }


CALLS = 10_000


async def test_after_10_000_random_calls_all_accounts_agree_and_nothing_is_left(captured):
    c = captured(
        20,
        limits=[Cap(5, by="model_name", overrides={"m1": 2}), Rate(6000, by="model_name")],
        max_queued=40,
        overflow="reject",
        queue_timeout=3,
        request_timeout=1,
        max_records=10 * CALLS,
    )
    queue, chance = c.queue, random.Random(4)
    got = dict.fromkeys(("ok", "error", "cancelled", "rejected", "queue_full", "dropped", "timeout"), 0)

    async def call(seconds, fate):
        await anyio.sleep(seconds)
        if fate < 0.1:
            raise ValueError(fate)
        if fate < 0.2:
            headers = {"retry-after": "0.05"} if fate < 0.15 else {}
            raise ProviderError("no", status_code=429, headers=headers, body={"type": "requests"})

    async def one(number):
        meta = LLMTaskMeta(f"features_{number % 3}", f"m{number % 5}", request_id=str(number))
        factory = functools.partial(call, chance.expovariate(5), chance.random())
        patience = chance.choice([0.2, 2, 60, 60, 60])
        retry = chance.choice([None, Retry(3, base=0.1)])
        await anyio.sleep(number * 0.0125)
        with anyio.move_on_after(patience) as scope:
            try:
                if number % 4:
                    await queue.submit(factory, meta=meta, retry=retry)
                else:
                    async with queue.slot(meta):
                        await factory()
                got["ok"] += 1
            except ValueError:
                got["error"] += 1
            except ProviderError:
                got["rejected"] += 1
            except QueueFullError:
                got["queue_full"] += 1
            except TimeoutError:
                got["timeout"] += 1
            except LLMQError:
                got["cancelled"] += 1
        if scope.cancelled_caught:
            got["cancelled"] += 1

    async def meddle():
        while True:
            await anyio.sleep(1)
            queue.resize(chance.randint(5, 30))
            if chance.random() < 0.1:
                queue.cancel(model_name="m3")

    async with anyio.create_task_group() as meddling:
        meddling.start_soon(meddle)
        async with anyio.create_task_group() as group:
            for number in range(CALLS):
                group.start_soon(one, number)
        meddling.cancel_scope.cancel()

    points = c.metrics(idle=True)
    assert set(points["llm_queue_inflight"].values()) == {0}
    assert set(points["llm_queue_depth"].values()) == {0}
    ended = dict.fromkeys(got, 0)
    for key, count in points["llm_queue_completed"].items():
        ended[dict(pair.split("=") for pair in key.split())["outcome"]] += count
    assert ended == got
    assert all(got[name] for name in got if name != "dropped"), "every fate has come"
    assert sum(points["llm_queue_submitted"].values()) == sum(ended.values()) == CALLS

    records, statistics = queue.records(), queue.statistics()
    assert len(records.operations) == len({record.operation_id for record in records.operations}) == CALLS
    outcomes = [record.outcome for record in records.operations]
    assert {name: outcomes.count(name) for name in got} == got
    assert sum(record.attempts for record in records.operations) >= len(records.attempts)
    assert (statistics.in_flight, statistics.waiting, statistics.at_door) == (0, 0, 0)
    ran = [record for record in records.attempts if record.started_at is not None]
    assert sum(statistics.ended.values()) == len(ran)
    assert statistics.ended[Outcome.SUCCEEDED] == sum(record.outcome == "ok" for record in ran)
    assert statistics.ended[Outcome.REJECTED] == sum(record.limit_type is not None for record in ran)
    assert sum(points["llm_queue_rate_limited"].values()) == statistics.ended[Outcome.REJECTED]
    assert sum(count for count, _ in points[OF_REQUEST].values()) == len(ran)
    assert sum(count for count, _ in points["llm_queue_wait"].values()) == len(records.attempts)
    assert sum(count for count, _ in points["llm_queue_duration"].values()) == CALLS
    waits = sum(total for _, total in points["llm_queue_wait"].values())
    assert waits == pytest.approx(sum(record.wait_seconds for record in records.operations))
    queue._scheduler.check()
    spans = c.spans()
    assert len([span for span in spans if span.name == "llm_queue.submit"]) == CALLS
    assert len([span for span in spans if span.kind is trace.SpanKind.CLIENT]) == len(ran)


async def test_the_callers_span_is_the_parent_and_ours_is_current_in_the_call(captured):
    c = captured()

    async def call():
        with c.tracer.start_as_current_span("inside"):
            await anyio.sleep(1)
        return current()

    with c.tracer.start_as_current_span("outside"):
        assert await c.queue.submit(call) is not None
        assert trace.get_current_span().name == "outside", "ours is current no longer"
        assert current() is None
    assert c.names() == ["outside", "  llm_queue.submit", "    chat", "    inside"]


@pytest.mark.parametrize("failure", [ValueError, None])
async def test_a_nested_call_is_a_child_and_its_requests_are_its_own(captured, failure):
    c = captured(2)
    async with Provider((0, b"{}"), kind="application/json").client() as client:

        async def inner():
            await client.get("https://inner.example/v1/chat/completions")
            if failure:
                raise failure

        async def outer():
            mine = current()
            await client.get("https://outer.example/v1/chat/completions")
            try:
                await c.queue.submit(inner, meta=LLMTaskMeta("inner"))
            except ValueError:
                pass
            assert current() is mine
            assert trace.get_current_span().attributes["stage"] == "outer"
            await client.get("https://outer.example/v1/chat/completions")

        await c.queue.submit(outer, meta=LLMTaskMeta("outer"))
    found = [(depth, span.get("stage") or span.get("server.address")) for depth, _, _, span, *_ in c.trees()]
    assert found == [(0, "outer"), (1, "outer.example"), (1, "inner"), (2, "inner.example"), (1, "outer.example")]
    attempts = c.queue.records().attempts
    assert [(record.stage, record.attempt, record.resent) for record in attempts] == [
        ("inner", 1, False),
        ("outer", 1, False),
        ("outer", 2, False),
    ]


async def test_a_generator_stepped_from_several_tasks_leaves_nothing_current_behind(captured):
    c = captured(3)

    async def stream():
        async with c.queue.slot(LLMTaskMeta("stream")):
            yield current().meta.stage
            yield 2

    async def finish(steps, around):
        async for _ in steps:
            pass
        assert current() is around

    async def call():
        mine, span = current(), trace.get_current_span()
        steps = stream()
        assert await anext(steps) == "stream"
        async with anyio.create_task_group() as group:
            group.start_soon(finish, steps, mine)
        assert current() is mine, "the call around it is current again, though the slot was left in another task"
        assert trace.get_current_span() is span

    await c.queue.submit(call, meta=LLMTaskMeta("around"))
    assert current() is None
    first, second = stream(), stream()
    assert await anext(first) == "stream"
    assert await anext(second) == "stream"
    for steps in (first, second):  # not the later one first
        async for _ in steps:
            pass
    assert current() is None
    assert c.metrics()["llm_queue_inflight"] == dict.fromkeys(["queue=q stage=stream", "queue=q stage=around"], 0)


async def test_places_that_were_left_elsewhere_do_not_pile_up(captured):
    from llmq.wire import sent

    c = captured()
    for _ in range(5):
        slot = c.queue.slot(META)
        await slot.__aenter__()
        slot.release()  # as another task would
    place, length = sent._current.get(), 0
    while place is not None:
        place, length = place.outer, length + 1
    assert length <= 1


def test_a_coroutine_that_is_closed_half_way_leaves_no_span_current(captured):
    c = captured()

    async def main():
        running, waiting = (c.queue.submit(sleep, meta=META) for _ in range(2))
        running.send(None)
        assert trace.get_current_span().name == "llm_queue.submit"
        waiting.send(None)
        waiting.close()
        assert trace.get_current_span().name == "llm_queue.submit"
        running.close()
        assert trace.get_current_span() is trace.INVALID_SPAN
        assert c.metrics()["llm_queue_completed"] == {BASE.format("outcome=cancelled "): 2}

    asyncio.run(main())


def test_the_callers_span_is_the_parent_across_threads_and_loops(captured):
    c = captured(4)

    def work():
        with c.tracer.start_as_current_span("work"):
            return 1

    async def call():
        return work()

    def in_own_loop():
        return asyncio.run(c.queue.submit(call))

    async def main(name):
        with c.tracer.start_as_current_span(name):
            await asyncio.to_thread(c.queue.submit_sync, work)
            await anyio.to_thread.run_sync(c.queue.submit_sync, work)
            await asyncio.to_thread(in_own_loop)
            await anyio.to_thread.run_sync(anyio.from_thread.run, functools.partial(c.queue.submit, call))
            assert trace.get_current_span().name == name

    for name in ("first", "second"):
        asyncio.run(main(name))
    one = ["  llm_queue.submit", "    chat", "    work"] * 4
    assert c.names() == ["first", *one, "second", *one]
    assert c.metrics()["llm_queue_submitted"] == {"queue=q": 8}


async def test_no_baggage_goes_to_the_provider(captured):
    from opentelemetry import baggage, context

    c, provider = captured(), Provider((0, b"{}"), kind="application/json")
    token = context.attach(baggage.set_baggage("user", "someone"))
    try:
        async with provider.client() as client:
            await c.queue.submit(functools.partial(client.get, URL))
    finally:
        context.detach(token)
    assert "traceparent" in provider.requests[0].headers
    assert "baggage" not in provider.requests[0].headers


async def test_content_is_on_the_attempts_span_where_it_is_asked_for(captured):
    body = {"choices": [{"message": {"role": "assistant", "content": "answer"}}], "model": "m-2026"}
    answer = (0, json.dumps(body).encode())
    request = {"system": "be brief", "messages": [{"role": "user", "content": "prompt"}], "api_key": "sk-1"}
    for content in (True, False):
        c = captured(content=content)
        async with Provider(answer, kind="application/json").client() as client:
            await c.queue.submit(functools.partial(client.post, URL, json=request), meta=META)
        row, attempt_row = c.trees()
        assert row == operation()
        found = {name: text for name, text in attempt_row[3].items() if "messages" in name}
        assert found == (
            {
                "gen_ai.input.messages": '[{"role": "system", "content": "be brief"}, '
                '{"role": "user", "content": "prompt"}]',
                "gen_ai.output.messages": '[{"role": "assistant", "content": "answer"}]',
            }
            if content
            else {}
        )
        assert "sk-1" not in c.exported()
        left = c.exported().replace(json.dumps(found.get("gen_ai.input.messages")), "")
        assert "be brief" not in left.replace(json.dumps(found.get("gen_ai.output.messages")), "")


@pytest.mark.parametrize(
    ("request_body", "answer", "told"),
    [
        (
            {"input": "hi"},
            {"output": [{"type": "message"}]},
            ('[{"role": "user", "content": "hi"}]', '[{"type": "message"}]'),
        ),
        (
            {"instructions": "i", "input": [{"role": "user", "content": "é"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "t"}]},
            (
                '[{"role": "system", "content": "i"}, {"role": "user", "content": "é"}]',
                '[{"role": "assistant", "content": [{"type": "text", "text": "t"}]}]',
            ),
        ),
        ({"prompt": "old"}, {"choices": [{"text": "old"}]}, (None, None)),
        ([1], [1], (None, None)),
        ({"messages": 7}, {"choices": [3], "content": "no"}, ('[{"role": "user", "content": 7}]', None)),
    ],
)
async def test_content_in_each_dialect(captured, request_body, answer, told):
    c = captured(content=True)
    async with Provider((0, json.dumps(answer).encode()), kind="application/json").client() as client:
        await c.queue.submit(functools.partial(client.post, URL, json=request_body))
    attributes = c.trees()[1][3]
    assert (attributes.get("gen_ai.input.messages"), attributes.get("gen_ai.output.messages")) == told


def test_content_by_aiohttp(captured):
    c = captured(content=True)
    answer = {"choices": [{"message": {"role": "assistant", "content": "answer"}}]}

    async def handle(request):
        return web.json_response(answer)

    async def main():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/chat/completions"
        async with aiohttp.ClientSession(middlewares=[llmq.aiohttp_middleware]) as session:

            async def call():
                async with session.post(url, json={"messages": ["prompt"]}) as response:
                    return await response.json()

            assert await c.queue.submit(call) == answer
        await runner.cleanup()

    asyncio.run(main())
    attributes = c.trees()[1][3]
    assert attributes["gen_ai.input.messages"] == '["prompt"]'
    assert attributes["gen_ai.output.messages"] == '[{"role": "assistant", "content": "answer"}]'


async def test_content_of_a_stream_is_its_prompt_alone(captured):
    c = captured(content=True)
    async with Provider(*STREAM).client() as client:
        await c.queue.submit(functools.partial(client.post, URL, json={"messages": []}))

        async def pieces():
            yield b'{"messages": ["streamed"]}'

        await c.queue.submit(functools.partial(client.post, URL, content=pieces()))
    first, second = (row[3] for row in c.trees() if row[0] == 1)
    assert first["gen_ai.input.messages"] == "[]"
    assert "gen_ai.output.messages" not in first
    assert "gen_ai.input.messages" not in second, "a body that is streamed is not kept either"


async def test_without_attempts_there_is_nothing_of_gen_ai_and_the_rest_is_the_same(captured):
    c, provider = captured(attempts=False, content=True), Provider(*STREAM)
    async with provider.client() as client:
        await c.queue.submit(functools.partial(client.post, URL, json={"messages": ["prompt"]}), meta=META)
    await c.queue.submit(sleep, meta=META)
    assert c.trees() == [operation()] * 2
    assert not [name for name in c.metrics() if name.startswith("gen_ai")]
    assert c.metrics()["llm_queue_completed"] == {BASE.format("outcome=ok "): 2}
    assert [record.seen for record in c.queue.records().attempts] == [True, False]
    assert "traceparent" not in provider.requests[0].headers, "whoever makes the span sends it"
    assert "prompt" not in c.exported()


@pytest.mark.parametrize("wanted", [False, True])
async def test_service_id_is_on_metrics_where_it_is_asked_for(captured, wanted):
    c = captured(service_id=wanted)
    await c.queue.submit(sleep, meta=META)
    assert ("service_id" in json.dumps(c.metrics())) is wanted
    base = f"{BASE.format('')}".replace(" stage=", " service_id=service-1 stage=") if wanted else BASE.format("")
    assert c.metrics()["llm_queue_submitted"] == {base: 1}
    assert "request-1" not in json.dumps(c.metrics())


def test_the_settings_reach_the_queue():
    chosen = Settings(
        llm_queue_enabled=True,
        llm_telemetry_service_id=True,
        llm_telemetry_attempts=False,
        llm_telemetry_content=True,
    )
    telemetry = RuntimeEnv.initialize(chosen).llm_queue._telemetry
    assert (telemetry.service_id, telemetry.attempts, telemetry.content) == (True, False, True)
    RuntimeEnv.reset()
    telemetry = RuntimeEnv.initialize(Settings(llm_queue_enabled=True)).llm_queue._telemetry
    assert (telemetry.service_id, telemetry.attempts, telemetry.content) == (False, True, False)


def values_of(points, name):
    return {dict(pair.split("=") for pair in key.split()).get(name) for key in points}


async def test_every_attribute_is_bounded(captured):
    c = captured(service_id=True)
    many = MAX_VALUES + 20
    answers = iter(range(many))

    async def fails(number):
        raise type(f"Error{number}", (Exception,), {})

    class Anywhere(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request):
            used = {"model": f"answering{next(answers)}", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
            return httpx2.Response(200, json=used)

    async with httpx2.AsyncClient(transport=AsyncTransport(Anywhere())) as client:
        for number in range(many):
            meta = LLMTaskMeta(f"stage{number}", f"model{number}", f"service{number}")
            with pytest.raises(Exception, match="^$"):
                await c.queue.submit(functools.partial(fails, number), meta=meta)
            await c.queue.submit(functools.partial(client.get, f"https://host{number}/v1/embeddings"), meta=meta)
    points = c.metrics()
    for instrument, names in {
        "llm_queue_submitted": ["stage", "model_name", "service_id"],
        "llm_queue_completed": ["stage", "model_name", "service_id"],
        "llm_queue_duration": ["stage", "model_name", "service_id", "error.type"],
        OF_REQUEST: ["error.type", "server.address", "gen_ai.request.model", "gen_ai.response.model"],
    }.items():
        for name in names:
            found = values_of(points[instrument], name) - {None}
            assert "_other" in found
            assert len(found) == MAX_VALUES + 1, (instrument, name)
    assert values_of(points[OF_REQUEST], "gen_ai.operation.name") == {"chat", "embeddings"}
    assert points["llm_queue_submitted"]["model_name=_other queue=q service_id=_other stage=_other"] == 2 * 20


async def test_plateaus_are_bounded(captured):
    c = captured()
    for plateau in (1, 3, 99, 100, 101, 5000, 9999):
        await c.queue.submit(functools.partial(sleep, 0), meta=LLMTaskMeta(f"features_{plateau}"))
    await c.queue.submit(functools.partial(sleep, 0), meta=LLMTaskMeta("mapping_3_data"))
    assert c.metrics()["llm_queue_submitted"] == {
        **{f"plateau={n} queue=q stage=features": 1 for n in (1, 3, 99)},
        "plateau=100 queue=q stage=features": 4,
        "plateau=3 queue=q set=data stage=mapping": 1,
    }


async def test_without_an_sdk_nothing_is_made(monkeypatch):
    import sys

    for name in [n for n in sys.modules if n.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    assert Telemetry().operation_started(META) is None


@pytest.mark.parametrize(
    ("stage", "attributes"),
    [
        ("descriptions", {"stage": "descriptions"}),
        ("features_3", {"stage": "features", "plateau": 3}),
        ("mapping_3_data", {"stage": "mapping", "plateau": 3, "set": "data"}),
        (None, {}),
    ],
)
async def test_stage_labels_are_taken_apart(stage, attributes):
    assert stage_attributes(stage) == attributes


async def test_buckets_double_from_10_ms():
    assert SECONDS_BUCKETS[0] == 0.01
    assert SECONDS_BUCKETS[13:] == pytest.approx((81.92, 163.84, 327.68, 655.36))


async def test_logfire_is_a_configuration_of_the_same_spans(anyio_backend_name):
    if anyio_backend_name == "trio":
        return  # the configuration is of the process; once is enough
    import subprocess
    import sys

    code = """
import asyncio, logfire
from logfire.testing import TestExporter, SimpleSpanProcessor
import llmq
exporter = TestExporter()
llmq.configure_logfire(send_to_logfire=False, additional_span_processors=[SimpleSpanProcessor(exporter)])
async def answer():
    return 1
asyncio.run(llmq.LLMQueue(1).submit(answer, meta=llmq.LLMTaskMeta(model_name="m")))
print(sorted(s["name"] for s in exporter.exported_spans_as_dict()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "['chat m', 'llm_queue.submit']", found.stderr


async def test_queues_with_telemetry_of_their_own_are_all_counted(captured):
    c = captured()
    others = [LLMQueue(3, telemetry=Telemetry(name, meter_provider=c.meters)) for name in ("q", "other")]
    await c.queue.submit(sleep)
    for queue in others:
        await queue.submit(sleep)
    assert c.metrics()["llm_queue_submitted"] == {"queue=q": 2, "queue=other": 1}
    assert c.metrics()["llm_queue_limit"] == {"queue=q": 4, "queue=other": 3}
