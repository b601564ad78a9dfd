import json

import anyio
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmq.errors import ProviderError
from llmq.providers.chat import ChatRequest
from llmq.providers.dialects import limit_headers
from llmq.providers.limits import Bucket, Limits, Refused
from llmq.providers.model import plan
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.retry import classify


def ask(text="hello", schema=None, stage=None):
    return ChatRequest("m", [{"role": "user", "content": text}], schema, stage)


def test_a_plan_depends_on_seed_body_and_attempt_only():
    spec = ProviderSpec(error_ratio=0.3, malformed_ratio=0.3)
    assert plan(spec, ask("a"), 1) == plan(spec, ask("a", stage=None), 1)
    assert plan(spec, ask("a"), 1).service_seconds != plan(spec, ask("a"), 2).service_seconds
    assert plan(spec, ask("a"), 1).service_seconds != plan(spec, ask("b"), 1).service_seconds
    other = spec.model_copy(update={"seed": 1})
    assert plan(spec, ask("a"), 1).answer.content != plan(other, ask("a"), 1).answer.content
    clean = ProviderSpec()
    assert plan(clean, ask("a"), 1).answer == plan(clean, ask("a"), 2).answer, "the answer itself is one for all"


def test_the_draws_of_a_seed_stay_what_they_are():
    spec = ProviderSpec(error_ratio=0.4)
    found = [plan(spec, ask("hello"), attempt) for attempt in (1, 2, 3, 4)]
    assert [(p.service_seconds, p.fault) for p in found] == [
        (0.08668859392795825, None),
        (0.10972344296942581, None),
        (0.07395121083042556, None),
        (0.07348329562455937, "error"),
    ]
    assert found[0].answer.content.startswith("Access measured trusted ")


def test_latency_has_the_mean_that_was_asked_for():
    spec = ProviderSpec(latency_seconds=2.0, sigma=0.5)
    drawn = [plan(spec, ask(str(n)), 1).service_seconds for n in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(2.0, rel=0.03)
    slow = ProviderSpec(latency_seconds=2.0, sigma=0, seconds_per_token=1.0, slow_stages={"draft": 3})
    found = plan(slow, ask("x"), 1)
    assert found.service_seconds == pytest.approx(2.0 + found.answer.completion_tokens)
    assert plan(slow, ask("x", stage="draft"), 1).service_seconds == pytest.approx(3 * found.service_seconds)


def test_faults_come_as_often_as_asked():
    spec = ProviderSpec(error_ratio=0.1, timeout_ratio=0.2, cut_ratio=0.3, malformed_ratio=0.05)
    faults = [plan(spec, ask(str(n)), 1).fault for n in range(4000)]
    for fault, ratio in [("error", 0.1), ("timeout", 0.2), ("cut", 0.3), ("malformed", 0.05), (None, 0.35)]:
        assert faults.count(fault) / 4000 == pytest.approx(ratio, abs=0.03)


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer", "minimum": 3, "maximum": 5}}},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 2},
    {"type": "array", "items": {"type": "integer"}, "minItems": 3, "uniqueItems": True},
    {"anyOf": [{"type": "null"}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
        },
        "required": ["name"],
    }}},
    {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}]},
    {"type": ["string", "null"], "minLength": 200},
    {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 100},
    {},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_answers_follow_any_schema(schema, seed):
    content = plan(ProviderSpec(seed=seed), ask("q", schema), 1).answer.content
    jsonschema.validate(json.loads(content), schema)


def test_what_is_no_behaviour_is_refused():
    with pytest.raises(ValidationError, match="latncy_seconds"):
        ProviderSpec(latncy_seconds=1)
    with pytest.raises(ValidationError, match="error_ratio"):
        ProviderSpec(error_ratio=2)
    with pytest.raises(ValidationError, match="limit_factors"):
        ProviderSpec(limit_factors=())
    with pytest.raises(ValidationError, match="limit_factors"):
        ProviderSpec(limit_factors=(1, 0))
    with pytest.raises(ValidationError, match="retry_after"):
        ProviderSpec(retry_after="never")


@pytest.mark.parametrize("name", ["seconds_per_token", "refusal_seconds"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_times_are_finite(name, value):
    with pytest.raises(ValidationError, match=name):
        ProviderSpec(**{name: value})


def test_a_limit_factor_is_a_million_at_most():
    with pytest.raises(ValidationError, match="limit_factors"):
        ProviderSpec(limit_factors=(1.0, 1e7))


def test_a_bucket_by_hand():
    bucket = Bucket(60, 10, now=100.0)  # 1 a second, 10 deep, full
    for _ in range(10):
        assert bucket.seconds_until(1, 100.0) == 0
        bucket.take(1, 100.0)
    assert bucket.seconds_until(1, 100.0) == 1.0
    assert bucket.seconds_until(1, 100.25) == 0.75
    assert bucket.level(105.0) == 5.0
    assert bucket.level(1e6) == 10.0
    assert bucket.seconds_until(50, 105.0) == 5.0, "more than it holds fits when it is full"
    bucket.take(50, 110.0)
    assert bucket.seconds_until(1, 110.0) == 41.0, "and the debt is paid"


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40)), max_size=80))
@settings(max_examples=100)
def test_no_window_admits_more_than_its_rate_and_the_burst(arrivals):
    spec = ProviderSpec(requests_per_minute=120, tokens_per_minute=600, bucket_seconds=5)
    limits = Limits(spec, now=0.0)
    now, admitted = 0.0, []
    for wait, tokens in arrivals:
        now += wait
        if limits.refuses(tokens, 0, now) is None:
            admitted.append((now, tokens))
    for start, _ in admitted:
        inside = [(at, tokens) for at, tokens in admitted if start <= at < start + 10]
        assert len(inside) <= 2 * 10 + 10 + 1e-6
        assert sum(t for _, t in inside) <= 10 * 10 + 50 + 1e-6


def test_limits_say_which_and_when_and_take_nothing_when_they_refuse():
    limits = Limits(ProviderSpec(requests_per_minute=60, tokens_per_minute=600, bucket_seconds=1), now=0.0)
    assert limits.refuses(5, 0, 0.0) is None
    assert limits.refuses(5, 0, 0.0) == Refused("requests", 1.0)
    assert limits.refuses(9, 0, 1.0) is None, "the refusal took no token"
    assert limits.refuses(50, 0, 2.0) is None, "more than the bucket holds goes when it is full"
    assert limits.refuses(10, 0, 3.0) == Refused("tokens", 4.0)
    assert limit_headers(ProviderSpec(), limits.states(7.0), 0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "0.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "10",
        "x-ratelimit-reset-tokens": "0.000s",
    }
    assert Limits(ProviderSpec(max_concurrency=2), 0.0).refuses(1, 2, 0.0).limit_type == "concurrency"


pytest_anyio = pytest.mark.anyio


@pytest_anyio
async def test_in_process_it_takes_its_time_and_keeps_its_books():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=2, sigma=0, max_concurrency=3))
    refused = []

    async def one(number):
        try:
            await provider.complete(ask(str(number), stage=f"stage_{number % 2}"))
        except ProviderError as error:
            refused.append(classify(error))

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(one, number)
        await anyio.sleep(1)
        assert provider.stats()["in_flight"] == 3
    assert [(v.limit_type, v.status_code, v.retry_after_seconds) for v in refused] == [("concurrency", 429, 1.0)] * 2
    stats = provider.stats(calls=True)
    assert (stats["requests"], stats["admitted"], stats["refused"]) == (5, 3, 2)
    assert (stats["peak_in_flight"], stats["in_flight"]) == (3, 0)
    assert stats["by_status"] == {"200": 3, "429": 2}
    assert sum(stage["requests"] for stage in stats["stages"].values()) == 5
    ended = [c["ended_at"] - c["started_at"] for c in stats["calls"] if c["status"] == 200]
    assert ended == pytest.approx([2.0] * 3)


@pytest_anyio
async def test_refusals_are_no_attempts_so_faults_do_not_depend_on_load():
    spec = ProviderSpec(requests_per_minute=60, bucket_seconds=1, latency_seconds=0.1, error_ratio=0.5)
    alone, crowded = SimulatedProvider(spec), SimulatedProvider(spec)
    for number in range(10):
        outcomes = []
        for provider in (alone, crowded):
            if provider is crowded:
                await provider_busy(provider)
            try:
                outcomes.append((await provider.complete(ask(str(number)))).content)
            except ProviderError as error:
                outcomes.append(error.status_code)
            await anyio.sleep(2)
        assert outcomes[0] == outcomes[1]


async def provider_busy(provider):
    """Fill the bucket's one place, so that a first sending is refused; then leave it time to refill."""
    for _ in range(2):
        try:
            await provider.complete(ask("filler"))
        except ProviderError:
            pass
    await anyio.sleep(2)


@pytest_anyio
async def test_latency_grows_with_load_above_its_slots():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1, sigma=0, load_slots=2))
    began = anyio.current_time()
    ends = []

    async def one(number):
        await provider.complete(ask(str(number)))
        ends.append(anyio.current_time() - began)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(one, number)
    assert sorted(ends) == pytest.approx([1.0, 1.0, 1.5, 2.0])


@pytest_anyio
@pytest.mark.parametrize(
    ("fault", "status", "retryable"),
    [("error_ratio", 500, True), ("timeout_ratio", 504, True), ("cut_ratio", None, True)],
)
async def test_each_fault_looks_like_the_real_one(fault, status, retryable):
    provider = SimulatedProvider(ProviderSpec(**{fault: 1.0}))
    began = anyio.current_time()
    with pytest.raises(ProviderError) as caught:
        await provider.complete(ask())
    assert (caught.value.status_code, classify(caught.value).retryable) == (status, retryable)
    if fault == "timeout_ratio":
        assert anyio.current_time() - began == pytest.approx(600)


@pytest_anyio
async def test_a_malformed_answer_is_no_json():
    provider = SimulatedProvider(ProviderSpec(malformed_ratio=1.0))
    answer = await provider.complete(ask("q", SCHEMAS[0]))
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.content)


@pytest_anyio
async def test_a_client_that_goes_away_frees_its_place():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=10))
    with anyio.move_on_after(1):
        await provider.complete(ask())
    stats = provider.stats()
    assert (stats["in_flight"], stats["by_status"]) == (0, {"0": 1})
