"""Quirks of real providers, simulated: windows, changing limits, dialects, a line of its own, a cold start."""

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.dialects import Kind, judge_response, rate_limit_state
from llmq.errors import ProviderError
from llmq.providers.chat import ChatRequest
from llmq.providers.limits import Bucket, Limits, Rate, Refused, Window
from llmq.providers.model import cold_factor
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.retry import classify

pytest_anyio = pytest.mark.anyio


def ask(text="hello", schema=None, **labels):
    return ChatRequest("m", [{"role": "user", "content": text}], schema, **labels)


def states(limits, now):
    return [(s.limit, s.remaining, s.reset_seconds) for s in limits.states(now)]


# Rates that change


def test_a_changing_rate_by_hand():
    rate = Rate(60, (1, 0.5), 10, start=100)
    assert [rate.at(now) for now in (100, 109, 110, 119, 120, 131)] == [1, 1, 0.5, 0.5, 1, 0.5]
    assert rate.amount(105, 125) == 5 + 5 + 5
    assert rate.amount(100, 165) == 3 * 15 + 5
    assert rate.seconds_for(5, 100) == 5
    assert rate.seconds_for(5, 108) == 2 + 6
    assert rate.seconds_for(30 + 5, 108) == 2 * 20 + 8
    assert Rate(60, (1, 0.5), 0.1).at(0.3) == 0.5, "0.3 % 0.2 is less than 0.1"
    assert list(rate.steps(108, 121)) == [(108, 1), (110, 0.5), (120, 1)]


def test_a_bucket_fills_by_the_changing_rate_and_is_as_deep_as_the_nominal_one():
    bucket = Bucket(60, 10, 0, Rate(60, (0.5, 2), 10))
    bucket.take(10, 0)
    assert bucket.depth == 10
    assert bucket.level(8) == 4
    assert bucket.level(11) == 7
    assert bucket.level(40) == 10
    assert bucket.seconds_until(9, 8) == 2 + 2
    assert bucket.state("requests", 8).limit == 30
    assert bucket.state("requests", 11).limit == 120
    assert bucket.state("requests", 8).reset_seconds == 2 + 2.5


RATES = st.builds(
    Rate,
    st.sampled_from([7.0, 60.0, 1000.0]),
    st.lists(st.sampled_from([0.25, 0.6, 1.0, 1.5]), min_size=1, max_size=4).map(tuple),
    st.sampled_from([0.5, 3.0, 60.0]),
    st.sampled_from([0.0, 1234.5]),
)


@given(RATES, st.floats(0, 500), st.floats(0.01, 500))
def test_the_time_for_an_amount_is_the_inverse_of_the_amount(rate, since, amount):
    start = rate.start + since
    assert rate.amount(start, start + rate.seconds_for(amount, start)) == pytest.approx(amount, rel=1e-6, abs=1e-6)


# Windows


def test_a_fixed_window_by_hand():
    limits = Limits(ProviderSpec(window="fixed", requests_per_minute=30, bucket_seconds=10), now=100.0)
    assert [limits.refuses(1, 0, 104.0) for _ in range(5)] == [None] * 5
    assert states(limits, 104.0) == [(5, 0, 6)]
    assert limits.refuses(1, 0, 104.0) == Refused("requests", 6.0)
    assert limits.refuses(1, 0, 109.5) == Refused("requests", 0.5)
    assert states(limits, 110.0) == [(5, 5, 0)]
    assert [limits.refuses(1, 0, 110.0) for _ in range(5)] == [None] * 5, "twice the rate around a border"
    assert limits.refuses(1, 0, 110.0) == Refused("requests", 10.0)


def test_a_sliding_window_by_hand():
    limits = Limits(ProviderSpec(window="sliding", tokens_per_minute=600, bucket_seconds=10), now=0.0)
    assert limits.refuses(60, 0, 0.0) is None
    assert limits.refuses(30, 0, 4.0) is None
    assert states(limits, 6.0) == [(100, 10, 8)]
    assert limits.refuses(10, 0, 6.0) is None
    assert limits.refuses(50, 0, 7.0) == Refused("tokens", 3.0)
    assert limits.refuses(80, 0, 7.0) == Refused("tokens", 7.0)
    assert limits.refuses(500, 0, 7.0) == Refused("tokens", 9.0), "more than it holds fits when it is empty"
    assert limits.refuses(60, 0, 10.0) is None
    assert states(limits, 16.0) == [(100, 40, 4)]


def test_a_window_waits_for_a_better_factor():
    spec = ProviderSpec(
        window="sliding", requests_per_minute=60, bucket_seconds=10, limit_factors=(0.5, 1), factor_seconds=4
    )
    limits = Limits(spec, now=0.0)
    assert [limits.refuses(1, 0, 1.0) for _ in range(5)] == [None] * 5
    assert limits.refuses(1, 0, 1.0) == Refused("requests", 3.0)
    assert states(limits, 1.0) == [(5, 0, 10)]
    assert [limits.refuses(1, 0, 4.0) for _ in range(5)] == [None] * 5
    assert states(limits, 9.0) == [(5, 0, 5)], "the factor fell: more is used than fits"


def meter_of(kind, rate, seconds):
    if kind == "bucket":
        return Bucket(0, seconds, rate.start, rate)
    return Window(rate, seconds, sliding=kind == "sliding")


@given(
    st.sampled_from(["bucket", "fixed", "sliding"]),
    RATES,
    st.sampled_from([1.0, 10.0, 60.0]),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40)), max_size=40),
)
@settings(max_examples=200)
def test_it_fits_when_it_was_said_to_fit_and_not_before(kind, rate, seconds, arrivals):
    meter, now = meter_of(kind, rate, seconds), rate.start
    for gap, amount in arrivals:
        now += gap
        wait = meter.seconds_until(amount, now)
        for share in (0.5, 0.99):
            if wait > 0.01:
                assert meter_after(meter, amount, now + share * wait) > 0
        assert meter_after(meter, amount, now + wait) < 1e-5
        if wait == 0:
            meter.take(amount, now)


def meter_after(meter, amount, then):
    """What a copy of the meter says at `then`: to ask is to forget what is over."""
    if isinstance(meter, Bucket):
        return meter.seconds_until(amount, then)
    kept = Window(meter.rate, meter._seconds, sliding=meter._sliding)
    kept._taken.extend(meter._taken)
    kept._used = meter._used
    return kept.seconds_until(amount, then)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40)), max_size=80))
def test_no_ten_seconds_admit_more_than_a_sliding_window_holds(arrivals):
    limits = Limits(ProviderSpec(window="sliding", requests_per_minute=30, bucket_seconds=10), now=0.0)
    now, admitted = 0.0, []
    for wait, tokens in arrivals:
        now += wait
        if limits.refuses(tokens, 0, now) is None:
            admitted.append(now)
    for start in admitted:
        assert sum(start <= at < start + 9.999 for at in admitted) <= 5


# Latency


def test_the_server_works_on_so_many_and_the_others_stand_in_line():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=2, sigma=0, server_slots=2))
    first = provider.begin(ask("a"), 10.0)
    seconds = [first.seconds, *[provider.begin(ask(str(n)), 11.0).seconds for n in range(4)]]
    assert seconds == [2, 2, 3, 4, 5]
    provider.end(first, 0, 11.5)
    assert provider.begin(ask("b"), 11.5).seconds == 17 - 11.5, "who goes away leaves the work behind"
    assert provider.begin(ask("c"), 100.0).seconds == 2
    assert provider.stats()["in_flight"] == 6


def test_a_refused_request_takes_no_slot():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=2, sigma=0, server_slots=1, max_concurrency=1))
    provider.begin(ask("a"), 0.0)
    assert provider.begin(ask("b"), 0.0).refused.limit_type == "concurrency"
    provider.begin(ask("c"), 0.0)
    assert provider._slots_free_at == [2.0]


def test_a_cold_server_warms_up_from_its_first_request_on():
    spec = ProviderSpec(latency_seconds=1, sigma=0, cold_seconds=10, cold_factor=3)
    assert [cold_factor(spec, age) for age in (0, 5, 10, 99)] == [3, 2, 1, 1]
    provider = SimulatedProvider(spec)
    assert [provider.begin(ask(str(now)), now).seconds for now in (50.0, 55.0, 60.0)] == [3, 2, 1]
    assert cold_factor(ProviderSpec(), 0.0) == 1
    assert cold_factor(ProviderSpec(), -1e-9) == 1
    assert cold_factor(spec, -1e-9) == 3


# Random refusals


def endings(spec, text, sendings):
    """What becomes of each sending of one body: "random", or (attempt, seconds, fault)."""
    provider, found = SimulatedProvider(spec), []
    for number in range(sendings):
        exchange = provider.begin(ask(text), float(number))
        refused = exchange.refused
        found.append(refused.limit_type if refused else (exchange.attempt, exchange.seconds, exchange.plan.fault))
        provider.end(exchange, 429 if refused else 200, float(number))
    return found, provider.stats()


def test_random_refusals_pass_and_leave_the_other_draws_alone():
    found, stats = endings(ProviderSpec(refusal_ratio=0.5, error_ratio=0.3), "q", 200)
    undisturbed, _ = endings(ProviderSpec(error_ratio=0.3), "q", 200)
    admitted = [ending for ending in found if ending != "random"]
    assert admitted == undisturbed[: len(admitted)]
    assert len(admitted) == pytest.approx(100, abs=25)
    assert stats["refused_by_type"] == {"random": 200 - len(admitted)}
    assert (stats["requests"], stats["admitted"], stats["in_flight"]) == (200, len(admitted), 0)
    assert stats["by_status"] == {"200": len(admitted), "429": 200 - len(admitted)}


def test_random_refusals_come_as_often_as_asked_and_do_not_depend_on_load():
    spec = ProviderSpec(refusal_ratio=0.2)
    calm = [endings(spec, str(n), 1)[0][0] == "random" for n in range(2000)]
    assert sum(calm) / 2000 == pytest.approx(0.2, abs=0.03)
    limited = SimulatedProvider(spec.model_copy(update={"max_concurrency": 1}))
    limited.begin(ask("filler"), 0.0)
    for number in range(50):
        types = {limited.begin(ask(str(number)), 0.0).refused.limit_type for _ in range(3)}
        assert ("random" in types) == calm[number]


def test_a_random_refusal_takes_nothing_of_a_limit_and_tells_of_none():
    provider = SimulatedProvider(ProviderSpec(refusal_ratio=1, requests_per_minute=60, bucket_seconds=1))
    for _ in range(3):
        exchange = provider.begin(ask(), 0.0)
        assert exchange.refused.limit_type == "random"
        assert exchange.headers(0.0) == {}
    verdict = judge_response(429, {}, {"error": exchange.body_of_refusal})
    assert (verdict.kind, verdict.limit_type, verdict.retry_after_seconds) == (Kind.RATE, "unknown", None)


# Dialects

WALL = 1_700_000_000.0


def refusal(limit_type, **spec):
    """The second of two requests at once, refused by the limit of that type."""
    limits = {
        "requests": {"requests_per_minute": 60, "bucket_seconds": 1, "tokens_per_minute": 60_000_000},
        "tokens": {"tokens_per_minute": 60, "bucket_seconds": 1, "requests_per_minute": 6000},
        "concurrency": {"max_concurrency": 1},
    }[limit_type]
    provider = SimulatedProvider(ProviderSpec(**{"refusal_seconds": 0, **limits, **spec}))
    provider.begin(ask(), 0.0)
    return provider.begin(ask(), 0.0)


def verdict_on(exchange):
    return judge_response(429, exchange.headers(WALL), {"error": exchange.body_of_refusal}, WALL)


@pytest.mark.parametrize("limit_type", ["requests", "tokens", "concurrency"])
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "azure"])
def test_a_refusal_is_read_as_it_was_meant(dialect, limit_type):
    exchange = refusal(limit_type, dialect=dialect)
    verdict = verdict_on(exchange)
    assert (verdict.kind, verdict.limit_type) == (Kind.RATE, limit_type)
    assert judge_response(429, {}, {"error": exchange.body_of_refusal}).limit_type == limit_type
    assert verdict.retry_after_seconds == pytest.approx(exchange.refused.retry_after_seconds, abs=1)
    assert verdict.retry_after_seconds >= exchange.refused.retry_after_seconds


@pytest.mark.parametrize("limit_type", ["requests", "tokens", "concurrency"])
def test_a_bare_provider_says_429_and_no_more(limit_type):
    exchange = refusal(limit_type, dialect="bare")
    assert exchange.headers(WALL) == {}
    verdict = verdict_on(exchange)
    assert (verdict.kind, verdict.limit_type, verdict.retry_after_seconds) == (Kind.RATE, "unknown", None)


def test_limits_are_read_as_they_were_meant():
    def told(dialect):
        spec = ProviderSpec(dialect=dialect, requests_per_minute=60, tokens_per_minute=6000, bucket_seconds=10)
        exchange = SimulatedProvider(spec).begin(ask(), 0.0)
        (tokens,) = {s.remaining for s in exchange.limits if s.kind == "tokens"}
        headers = exchange.headers(WALL)
        found = rate_limit_state(headers, WALL)
        return headers, tokens, [(s.dimension, s.limit, s.remaining, s.reset_seconds) for s in found]

    for dialect in ("openai", "anthropic"):
        headers, tokens, found = told(dialect)
        reset = pytest.approx((1000 - tokens) / 100, abs=0.001)
        assert found == [("requests", 60, 9, pytest.approx(1.0)), ("tokens", 6000, tokens, reset)]
    assert headers["anthropic-ratelimit-requests-reset"] == "2023-11-14T22:13:21.000Z"
    headers, tokens, found = told("azure")
    assert found == [("requests", None, 9, None), ("tokens", None, tokens, None)]
    assert told("bare")[0] == {}


def test_retry_after_can_be_silent_or_a_lie():
    def told(**spec):
        found = refusal("requests", **spec).headers(WALL)
        return {name: value for name, value in found.items() if name.startswith("retry")}

    assert told() == {"retry-after": "1", "retry-after-ms": "1000"}
    assert told(dialect="anthropic") == {"retry-after": "1"}
    assert told(dialect="azure") == {"retry-after-ms": "1000"}
    for dialect in ("openai", "anthropic", "azure", "bare"):
        assert told(dialect=dialect, retry_after="none") == {}
    assert told(retry_after=7.5) == {"retry-after": "8", "retry-after-ms": "7500"}
    assert told(dialect="bare", retry_after=30) == {"retry-after": "30"}
    lied = SimulatedProvider(ProviderSpec(refusal_ratio=1, retry_after=2)).begin(ask(), 0.0)
    assert verdict_on(lied).retry_after_seconds == 2


# In-process


@pytest_anyio
async def test_in_process_the_quirks_are_the_same():
    spec = ProviderSpec(latency_seconds=1, sigma=0, server_slots=1, max_concurrency=3, dialect="anthropic")
    provider, began, ends, refused = SimulatedProvider(spec), anyio.current_time(), [], []

    async def one(number):
        try:
            await provider.complete(ask(str(number)))
            ends.append(anyio.current_time() - began)
        except ProviderError as error:
            refused.append(classify(error))

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(one, number)
    assert ends == pytest.approx([1, 2, 3])
    assert [(v.limit_type, v.retry_after_seconds) for v in refused] == [("concurrency", 1.0)]


@pytest_anyio
async def test_who_gives_up_in_line_leaves_no_room():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=10, sigma=0, server_slots=1))
    began = anyio.current_time()
    for _ in range(2):
        with anyio.move_on_after(1):
            await provider.complete(ask("gone"))
    await provider.complete(ask("stays"))
    assert anyio.current_time() - began == pytest.approx(30)
    assert provider.stats()["by_status"] == {"0": 2, "200": 1}


# The body's digest


def test_the_digest_is_that_of_the_body_as_it_is_now():
    provider, request = SimulatedProvider(), ask("a")
    bodies = [
        [{"role": "user", "content": "a"}],
        [{"content": "a", "role": "user"}],
        [{"role": "user", "content": "b"}],
    ]
    bodies += [[{"role": "user", "content": "a"}, {}], [{"role": "user"}, {"content": "a"}], []]
    bodies += [
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": True}],
        [{"role": "user", "content": ["a"]}],
    ]
    for messages in bodies * 2:
        request.messages = messages
        assert provider._digest(request) == request.digest()
    request.messages = [{"role": "user", "content": "a"}]
    request.schema = {"type": "null"}
    assert provider._digest(request) == request.digest() != provider._digest(ask("a"))
    request.messages[0]["content"] = "b"
    assert provider._digest(request) == request.digest()
