import json
import re
import statistics
import sys
import threading
import timeit
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq import (
    AttemptRecord,
    Budget,
    BudgetExceededError,
    Ledger,
    LLMTaskMeta,
    OperationRecord,
    Price,
    QueueError,
    Settings,
)
from llmq.errors import ConfigError, InputError
from llmq.ledger import SAMPLES
from llmq.telemetry import MAX_VALUES
from llmq.tune.statistics import percentile

LARGE = Price(2.5, 10)
PRICES = {"large": LARGE, "small": Price(0.15, 0.6)}
NOON = 1_780_000_000 // 86400 * 86400 + 43200  # of 2026-05-28, UTC
DAY = "2026-05-28"
FILE = Path("day.json")


def attempt(
    tokens=(100, 50), *, model="large", stage="features_1", service="a", wait=1.0, ran=2.0, outcome="ok", **more
):
    ran_from = None if ran is None else wait
    ended = wait + (ran or 0.0)
    told = dict(zip(("input_tokens", "output_tokens"), tokens, strict=True))
    return AttemptRecord(1, 1, stage, model, service, "r", 0.0, ran_from, ended, outcome, **told, **more)


def operation(outcome="ok", stage="features_1", model="large"):
    return OperationRecord(1, stage, model, "a", "r", 0.0, 3.0, 1, 1.0, outcome)


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


# Prices and budgets


def test_a_price_is_per_million_tokens():
    assert LARGE.cost_usd(1_000_000, 0) == 2.5
    assert LARGE.cost_usd(0, 1_000_000) == 10
    assert Price(0.15, 0.6).cost_usd(1, 1) == 0.00000075


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan"), True, "2.5", 1e-7])
def test_a_wrong_price_is_refused(wrong):
    with pytest.raises(ValueError, match="USD per million tokens"):
        Price(wrong, 1)
    with pytest.raises(ValueError, match="output="):
        Price(1, wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either of tokens or of cost"),
        ({"tokens": 1, "cost": 1}, "either of tokens or of cost"),
        ({"tokens": 0}, "at least 1 token, got 0"),
        ({"cost": 0}, "at least 0.000001 USD, got 0"),
        ({"cost": float("inf")}, "got inf"),
        ({"cost": True}, "got True"),
        ({"tokens": 5, "per": "week"}, "per='week'"),
        ({"tokens": 5, "by": "agent"}, "not by labels; got by='agent'"),
        ({"tokens": 5, "overrides": {"a": 3}}, "say by what"),
        ({"tokens": 5, "by": "service_id", "overrides": {"a": 0}}, "budget of service_id a must"),
        ({"tokens": 5, "by": "stage", "overrides": {"features_3": 9}}, "goes by features, which features_3"),
    ],
)
def test_a_wrong_budget_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


def test_two_budgets_of_the_same_kind_are_refused():
    Ledger({}, [Budget(tokens=5), Budget(cost=5), Budget(tokens=5, per="day"), Budget(tokens=5, by="stage")])
    with pytest.raises(ValueError, match="two budgets of the same kind"):
        Ledger({}, [Budget(tokens=5), Budget(tokens=6)])


# What is counted


def test_exact_figures_of_a_small_run():
    ledger = Ledger(PRICES)
    ledger.add_attempt(attempt((1000, 500), wait=0.0, ran=2.0))
    ledger.add_attempt(attempt((1000, 500), stage="features_2", wait=1.0, ran=4.0))
    ledger.add_attempt(attempt((200, 100), stage="mapping_1_data", model="small", wait=2.0, ran=9.0))
    ledger.add_attempt(attempt((None, None), wait=3.0, ran=0.005, outcome="rejected", limit_type="tokens"))
    ledger.add_attempt(attempt((None, None), wait=5.0, ran=None, outcome="timeout"))
    ledger.add_attempt(attempt((10, 0), wait=0.0, ran=1.0, outcome="error", resent=True, seen=True))
    for outcome in ("ok", "ok", "ok", "timeout"):
        ledger.add_operation(operation(outcome))
    found = ledger.summary(10.0)

    assert (found.seconds, found.calls, found.calls_by_outcome) == (10.0, 4, {"ok": 3, "timeout": 1})
    assert (found.attempts, found.attempts_per_call, found.resent) == (5, 1.25, 1)
    assert found.refusals == {"tokens": 1}
    usage = found.usage
    assert (usage.input_tokens, usage.output_tokens, usage.attempts_with_unknown_tokens) == (2210, 1100, 0)
    # 2010 in at 2.5, 1000 out at 10; 200 in at 0.15, 100 out at 0.6
    assert (usage.cost_usd, usage.tokens_without_price) == (0.015115, 0)
    assert (found.wait.count, found.wait.sum_seconds, found.wait.max_seconds) == (5, 11.0, 5.0)  # resent: did not wait
    assert (found.wait.p50_seconds, found.wait.p95_seconds) == (2.0, pytest.approx(4.6))
    assert (found.service.count, found.service.sum_seconds, found.service.max_seconds) == (4, 16.0, 9.0)  # not refused
    assert (found.service.p50_seconds, found.service.p95_seconds) == (3.0, pytest.approx(8.25))

    slowest, next_one = found.slowest
    assert (slowest.stage, slowest.model_name, slowest.attempts, slowest.calls) == ("mapping", "small", 1, 0)
    assert slowest.usage.cost_usd == 0.00009
    assert (next_one.stage, next_one.attempts, next_one.calls, next_one.refused) == ("features", 4, 4, 1)
    assert next_one.service.p95_seconds == pytest.approx(3.8)


def test_door_refusals_did_not_wait_and_unasked_tokens_are_unknown():
    ledger = Ledger(PRICES)
    ledger.add_attempt(attempt((None, None), wait=0.0, ran=None, outcome="queue_full"))
    ledger.add_attempt(attempt((None, None)))
    ledger.add_attempt(attempt((7, None)))
    ledger.add_attempt(attempt((None, None), outcome="rejected"))
    found = ledger.summary()
    assert (found.wait.count, found.refusals) == (3, {"unknown": 1})
    assert (found.usage.attempts_with_unknown_tokens, found.usage.input_tokens) == (2, 7)


def test_a_model_without_price_costs_unknown_and_not_nothing():
    ledger = Ledger(PRICES)
    ledger.add_attempt(attempt((30, 12), model="other"))
    ledger.add_attempt(attempt((1, 0), model=None))
    found = ledger.summary()
    assert (found.usage.cost_usd, found.usage.tokens_without_price) == (None, 43)
    assert found.models_without_price == ("(no model named)", "other")
    assert "unknown; no price for 43 tokens of (no model named), other: set llm_prices" in str(found)
    ledger.add_attempt(attempt((1_000_000, 0)))
    found = ledger.summary()
    assert (found.usage.cost_usd, found.usage.tokens_without_price) == (2.5, 43)
    assert "at least 2.50 USD; no price for 43 tokens" in str(found)


def test_nothing_done_costs_nothing_and_nothing_told_is_unknown():
    ledger = Ledger(PRICES)
    assert ledger.summary().usage.cost_usd == 0
    assert ledger.summary().attempts_per_call is None
    assert ledger.summary().wait.p50_seconds is None
    ledger.add_attempt(attempt((None, None)))
    assert ledger.summary().usage.cost_usd is None
    assert "unknown of 1 attempt that did not tell" in str(ledger.summary())


def test_memory_is_bounded_but_for_what_is_summed():
    ledger = Ledger(PRICES)
    for n in range(MAX_VALUES + 20):
        ledger.add_attempt(attempt((1, 1), stage=f"label {n}", model=f"m{n}", limit_type=f"limit {n}"))
        ledger.add_operation(operation(stage=f"label {n}", model=f"m{n}"))
    assert len(ledger._accounts) == MAX_VALUES + 1
    other = ledger._accounts["_other", "_other"]
    assert (other.attempts, other.calls.total(), other.input_tokens) == (20, 20, 20)
    found = ledger.summary()
    assert (len(found.models_without_price), len(found.refusals)) == (MAX_VALUES, MAX_VALUES + 1)
    assert found.usage.tokens_without_price == 2 * (MAX_VALUES + 20)


def test_percentiles_are_exact_up_to_the_sample_and_near_beyond():
    ledger = Ledger()
    times = [((n * 7919) % 10007) / 10007 for n in range(SAMPLES)]
    for seconds in times:
        ledger.add_attempt(attempt(wait=seconds))
    assert ledger.summary().wait.p50_seconds == pytest.approx(percentile(times, 0.5))
    assert ledger.summary().wait.p95_seconds == pytest.approx(percentile(times, 0.95))
    for n in range(SAMPLES, 10007):
        ledger.add_attempt(attempt(wait=((n * 7919) % 10007) / 10007))
    found = ledger.summary().wait
    assert len(ledger._all.wait.samples) == SAMPLES
    assert found.count == 10007
    assert found.p50_seconds == pytest.approx(0.5, abs=0.05)
    assert found.p95_seconds == pytest.approx(0.95, abs=0.025)
    assert found.max_seconds == 10006 / 10007


def test_late_times_have_their_share_of_the_sample():
    ledger = Ledger()
    for n in range(4 * SAMPLES):
        ledger.add_attempt(attempt(wait=float(n >= 2 * SAMPLES)))
    assert statistics.fmean(ledger._all.wait.samples) == pytest.approx(0.5, abs=0.06)
    again = Ledger()
    for n in range(4 * SAMPLES):
        again.add_attempt(attempt(wait=float(n >= 2 * SAMPLES)))
    assert again.summary() == ledger.summary()


RECORDS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 10**7)),
        st.one_of(st.none(), st.integers(0, 10**7)),
        st.sampled_from(["large", "small", "other", None]),
        st.sampled_from(["features_1", "features_2", "mapping_1_data", "x", None]),
        st.sampled_from(["a", "b", None]),
        st.sampled_from(["ok", "error", "rejected", "timeout"]),
    ),
    max_size=40,
)


@given(RECORDS)
def test_totals_are_the_sums(rows):
    ledger = Ledger(PRICES, [Budget(tokens=10**9, by="service_id"), Budget(cost=1e6)])
    picodollars = unpriced = 0
    for n_in, n_out, model, stage, service, outcome in rows:
        ledger.add_attempt(attempt((n_in, n_out), model=model, stage=stage, service=service, outcome=outcome))
        ledger.add_operation(operation(outcome, stage, model))
        told = (n_in or 0, n_out or 0)
        if model in PRICES:
            picodollars += PRICES[model].picodollars(*told)
        else:
            unpriced += sum(told)
    found = ledger.summary()
    assert (found.calls, found.attempts) == (len(rows), len(rows))
    assert sum(found.calls_by_outcome.values()) == len(rows)
    assert found.usage.input_tokens == sum(row[0] or 0 for row in rows)
    assert found.usage.output_tokens == sum(row[1] or 0 for row in rows)
    assert found.usage.tokens_without_price == unpriced
    assert found.usage.cost_usd in (None, picodollars / 10**12)
    if picodollars:
        assert found.usage.cost_usd == picodollars / 10**12
    accounts = ledger._accounts.values()
    assert sum(account.picodollars for account in accounts) == picodollars
    assert sum(account.attempts for account in accounts) == len(rows)
    used = {budget.key: budget.used for budget in found.budgets if budget.unit == "tokens"}
    for service in ("a", "b", None):
        assert used.get(service, 0) == sum((r[0] or 0) + (r[1] or 0) for r in rows if r[4] == service)


# Budgets


def test_events_come_at_80_and_100_percent_once():
    ledger = Ledger(PRICES, [Budget(tokens=100)])
    events = [ledger.add_attempt(attempt((tokens, 0))) for tokens in (79, 1, 19, 1, 50)]
    assert [[event.share for event in found] for found in events] == [[], [0.8], [], [1.0], []]
    (event,) = events[1]
    assert (event.budget, event.key, event.used, event.limit) == (Budget(tokens=100), None, 80, 100)
    assert str(event) == "80% of the budget of 100 tokens per run is used: 80 tokens"


def test_one_leap_past_both_comes_as_the_higher():
    ledger = Ledger(PRICES, [Budget(tokens=100), Budget(cost=0.001)])
    assert [event.share for event in ledger.add_attempt(attempt((10, 100)))] == [1.0, 1.0]
    assert ledger.add_attempt(attempt((10, 100))) == ()


def test_small_sums_of_money_reach_their_limit_exactly():
    ledger = Ledger({"large": Price(0.1, 0)}, [Budget(cost=0.0000001 * 10)])  # ten tokens
    events = [ledger.add_attempt(attempt((1, 0))) for _ in range(10)]
    assert [n for n, found in enumerate(events, 1) if found] == [8, 10]
    assert ledger.check(LLMTaskMeta(model_name="large")) is not None


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["a", "b"])), max_size=30), st.integers(1, 100))
def test_events_fire_once_at_the_right_add(rows, limit):
    ledger = Ledger({}, [Budget(tokens=limit, by="service_id", overrides={"b": 2 * limit})])
    used = {"a": 0, "b": 0}
    for tokens, service in rows:
        most = 2 * limit if service == "b" else limit
        before, used[service] = used[service], used[service] + tokens
        crossed = [n for n in (80, 100) if before * 100 < n * most <= used[service] * 100]
        events = ledger.add_attempt(attempt((tokens, 0), service=service))
        assert [(e.key, e.share, e.used, e.limit) for e in events] == [
            (service, n / 100, used[service], most) for n in crossed[-1:]
        ]
        assert (ledger.check(LLMTaskMeta(service_id=service)) is not None) == (used[service] >= most)


def test_check_says_what_is_used_up_and_the_way_out():
    ledger = Ledger(PRICES, [Budget(tokens=100, per="day", by="service_id"), Budget(cost=1.0)])
    free, used = (LLMTaskMeta(model_name="large", service_id=name) for name in "ab")
    ledger.add_attempt(attempt((100, 21), service="b"))
    assert ledger.check(free) is None
    assert ledger.check(used) == (
        "the budget of 100 tokens per day for service_id b is used up: 121 tokens are used; "
        "wait for the next day at 00:00 UTC, or raise it (llm_budgets)"
    )
    ledger.add_attempt(attempt((0, 100_000), service="c"))
    assert ledger.check(free) == (
        "the budget of 1.00 USD per run is used up: 1.00 USD are used; start another run, or raise it (llm_budgets)"
    )


def test_a_budget_of_cost_needs_prices():
    ledger = Ledger(PRICES, [Budget(cost=5)])
    assert ledger.check(LLMTaskMeta(model_name="small")) is None
    assert ledger.check(LLMTaskMeta(model_name="other")) == (
        "the budget of 5.00 USD per run cannot be kept for model other, which has no price: its cost is unknown; "
        "set it in llm_prices, {other: {input: ..., output: ...}}, in USD per million tokens"
    )
    assert "names no model" in ledger.check(LLMTaskMeta())
    assert Ledger({}, [Budget(tokens=5)]).check(LLMTaskMeta(model_name="other")) is None


def test_calls_without_the_field_share_one_budget_and_stages_go_together():
    ledger = Ledger({}, [Budget(tokens=10, by="service_id"), Budget(tokens=100, by="stage")])
    ledger.add_attempt(attempt((10, 0), service=None, stage="features_1"))
    assert "for calls without service_id is used up" in ledger.check(LLMTaskMeta())
    ledger.add_attempt(attempt((90, 0), stage="features_2"))
    assert "for stage features is used up" in ledger.check(LLMTaskMeta("features_7", service_id="z"))


def test_no_budgets_no_cost():
    ledger, meta = Ledger(PRICES), LLMTaskMeta("features_1", "large", "a")
    assert min(timeit.repeat(lambda: ledger.check(meta), number=2000, repeat=7)) / 2000 < 1e-6


# Days


def test_a_day_ends_at_midnight_utc_and_a_clock_set_back_begins_none():
    clock = Clock(NOON + 43199)
    ledger = Ledger({}, [Budget(tokens=100, per="day"), Budget(tokens=150)], now_epoch=clock)
    assert len(ledger.add_attempt(attempt((100, 0)))) == 1
    assert "per day is used up" in ledger.check(LLMTaskMeta())
    clock.now = NOON + 43200
    assert ledger.check(LLMTaskMeta()) is None
    assert [event.budget.per for event in ledger.add_attempt(attempt((85, 0)))] == ["day", "run"]
    clock.now = NOON
    assert [budget.used for budget in ledger.summary().budgets] == [85, 185]
    clock.now = NOON + 2 * 86400
    assert [budget.used for budget in ledger.summary().budgets] == [0, 185]


BY_SERVICE = Budget(tokens=1000, per="day", by="service_id")
COST_A_DAY = Budget(cost=1, per="day")


def test_a_second_run_of_the_day_goes_on_and_tells_nothing_twice():
    ledger = Ledger(PRICES, [BY_SERVICE, COST_A_DAY, Budget(tokens=10_000)], path=FILE, now_epoch=Clock())
    assert len(ledger.add_attempt(attempt((800, 0)))) == 1
    ledger.close()
    assert json.loads(FILE.read_text()) == {
        "format": "llmq day totals 1",
        "day": DAY,
        "totals": [
            {"unit": "tokens", "by": "service_id", "key": "a", "used": 800},
            {"unit": "picodollars", "by": None, "key": None, "used": 2_000_000_000},
        ],
    }
    again = Ledger(PRICES, [COST_A_DAY, BY_SERVICE, Budget(tokens=10_000)], path=FILE, now_epoch=Clock(NOON + 3600))
    assert [budget.used for budget in again.summary().budgets] == [0.002, 800, 0]
    assert again.add_attempt(attempt((100, 0))) == ()
    assert [event.used for event in again.add_attempt(attempt((100, 0)))] == [1000]
    tomorrow = Ledger(PRICES, [BY_SERVICE], path=FILE, now_epoch=Clock(NOON + 86400))
    assert tomorrow.summary().budgets == ()


def test_a_run_with_other_budgets_keeps_what_it_does_not_go_by():
    for budgets in ([BY_SERVICE], [COST_A_DAY], [BY_SERVICE, COST_A_DAY]):
        ledger = Ledger(PRICES, budgets, path=FILE, now_epoch=Clock())
        ledger.add_attempt(attempt((100, 0)))
        ledger.close()
    assert [entry["used"] for entry in json.loads(FILE.read_text())["totals"]] == [200, 500_000_000]


def test_the_file_is_written_at_most_every_few_seconds_and_whole(monkeypatch):
    clock, path = Clock(), Path("new/folder/day.json")
    ledger = Ledger({}, [Budget(tokens=1000, per="day")], path=path, now_epoch=clock)
    written = []
    for clock.now in (NOON + 1, NOON + 4.9, NOON + 5, NOON + 9, NOON + 10.5):
        ledger.add_attempt(attempt((1, 0)))
        totals = json.loads(path.read_text())["totals"]
        written.append(totals[0]["used"] if totals else 0)
    assert written == [0, 0, 3, 3, 5]
    assert [file.name for file in path.parent.iterdir()] == ["day.json"]


def test_a_write_that_fails_stops_no_call_but_close_tells(monkeypatch):
    clock = Clock()
    ledger = Ledger({}, [Budget(tokens=1000, per="day")], path=FILE, now_epoch=clock)
    before = FILE.read_text()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llmq.ledger.os.replace", refuse)
        clock.now += 60
        ledger.add_attempt(attempt((1, 0)))
        with pytest.raises(InputError, match=r"day\.json: cannot write .*No space left"):
            ledger.close()
    assert FILE.read_text() == before
    assert [file.name for file in Path().iterdir()] == ["day.json"]
    ledger.close()
    assert json.loads(FILE.read_text())["totals"][0]["used"] == 1


GOOD = {"format": "llmq day totals 1", "day": DAY, "totals": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps(GOOD)[:-9],
        "[]",
        "{}",
        "\udcff",
        json.dumps(GOOD | {"format": "another"}),
        json.dumps(GOOD | {"day": "yesterday"}),
        json.dumps(GOOD | {"day": 5}),
        json.dumps(GOOD | {"totals": [{"unit": "tokens", "by": None, "key": None}]}),
        json.dumps(GOOD | {"totals": [{"unit": "euro", "by": None, "key": None, "used": 1}]}),
        json.dumps(GOOD | {"totals": [{"unit": "tokens", "by": None, "key": None, "used": -1}]}),
        json.dumps(GOOD | {"totals": [{"unit": "tokens", "by": None, "key": 3, "used": 1}]}),
        json.dumps(GOOD | {"totals": [{"unit": "tokens", "by": [], "key": None, "used": 1.5}]}),
    ],
)
def test_a_torn_or_foreign_file_is_refused_and_left_alone(text):
    FILE.write_bytes(text.encode(errors="surrogateescape"))
    before = FILE.read_bytes()
    with pytest.raises(InputError, match=r"day\.json: not the day totals of llmq .*llm_budget_ledger"):
        Ledger({}, [COST_A_DAY], path=FILE, now_epoch=Clock())
    assert FILE.read_bytes() == before


def test_a_path_that_cannot_be_used_is_refused_at_the_start():
    Path("folder").mkdir()
    with pytest.raises(InputError, match="folder: cannot read"):
        Ledger({}, [COST_A_DAY], path=Path("folder"))
    FILE.write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match=r"below\.json: cannot"):
        Ledger({}, [COST_A_DAY], path=FILE / "below.json")


def test_without_a_budget_per_day_no_file_is_touched():
    ledger = Ledger({}, [Budget(tokens=5)], path=FILE)
    ledger.add_attempt(attempt())
    ledger.close()
    assert not FILE.exists()


# Threads


@pytest.fixture
def _busy_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_busy_switching")
def test_threads_that_add_at_once_lose_nothing():
    clock = Clock()
    ledger = Ledger(PRICES, [Budget(tokens=20_000), BY_SERVICE], path=FILE, now_epoch=clock)
    events = []

    def add(service):
        for n in range(1000):
            clock.now += 1
            events.extend(ledger.add_attempt(attempt((3, 2), service=service, wait=float(n))))
            ledger.add_operation(operation())
            if n % 100 == 0:
                ledger.summary()
                ledger.check(LLMTaskMeta(model_name="large"))

    threads = [threading.Thread(target=add, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ledger.summary()
    assert (found.attempts, found.calls, found.wait.count) == (4000, 4000, 4000)
    assert (found.usage.input_tokens, found.usage.output_tokens) == (12_000, 8_000)
    assert found.usage.cost_usd == LARGE.cost_usd(12_000, 8_000)
    assert sorted((event.key or "", event.share) for event in events) == [
        *[("", 0.8), ("", 1.0)],
        *[(key, share) for key in "abcd" for share in (0.8, 1.0)],
    ]
    ledger.close()
    assert {e["key"]: e["used"] for e in json.loads(FILE.read_text())["totals"]} == dict.fromkeys("abcd", 5000)


# The report


def busy_ledger(stages=9, services=9):
    ledger = Ledger(PRICES, [Budget(cost=5), Budget(tokens=1000, by="service_id"), Budget(tokens=9e6, by="model_name")])
    for n in range(stages):
        ledger.add_attempt(attempt(stage=f"stage {n}", ran=float(n)))
    for n in range(services):
        ledger.add_attempt(attempt((10 * n, 0), service=f"s{n}", model="other"))
    ledger.add_operation(operation())
    return ledger


def test_the_slowest_stages_and_the_keys_nearest_their_limit_are_told():
    found = busy_ledger().summary()
    assert [stage.stage for stage in found.slowest] == [f"stage {n}" for n in (8, 7, 6, 5, 4)]
    by_service = [budget for budget in found.budgets if budget.by == "service_id"]
    assert [(b.key, b.used, b.limit, b.share) for b in by_service] == [
        ("a", 1350, 1000, 1.35),
        *[(f"s{n}", 10 * n, 1000, 0.01 * n) for n in (8, 7, 6, 5)],
    ]


TIMES = ["count", "sum_seconds", "p50_seconds", "p95_seconds", "max_seconds"]
USAGE = ["input_tokens", "output_tokens", "attempts_with_unknown_tokens", "tokens_without_price", "cost_usd"]


def test_json_keys_are_pinned():
    found = json.loads(busy_ledger().summary(3.5).to_json())
    assert list(found) == [
        *["seconds", "calls", "calls_by_outcome", "attempts", "attempts_per_call", "resent", "refusals", "usage"],
        *["models_without_price", "wait", "service", "slowest", "budgets"],
    ]
    assert list(found["usage"]) == USAGE
    assert list(found["wait"]) == list(found["service"]) == TIMES
    stage = found["slowest"][0]
    assert list(stage) == ["stage", "model_name", "calls", "attempts", "refused", "wait", "service", "usage"]
    assert (list(stage["wait"]), list(stage["service"]), list(stage["usage"])) == (TIMES, TIMES, USAGE)
    assert list(found["budgets"][0]) == ["unit", "per", "by", "key", "used", "limit", "share"]
    assert [budget["unit"] for budget in found["budgets"][:2]] == ["usd", "tokens"]
    assert (found["seconds"], found["models_without_price"]) == (3.5, ["other"])


def test_the_text_is_short_aligned_and_plain():
    text = str(busy_ledger().summary(3.5))
    lines = text.splitlines()
    assert len(lines) <= 25
    assert lines[0] == "Calls     1 in 3.5 s: ok 1"
    assert [line.split()[-1] for line in lines[16:21]] == ["135%", "8%", "7%", "6%", "5%"]
    assert lines[21] == "and 3 more, further from their limit"
    table = lines[8:14]
    assert {line.index(word) + len(word) for line, word in zip(table, ["model"] + ["large"] * 5, strict=True)} == {
        table[0].index("model") + 5
    }
    assert len({len(line) for line in table}) == 1
    ledger = Ledger()
    ledger.add_attempt(attempt(stage="\x1b[31mred\n\n\n", model="m" * 500))
    text = str(ledger.summary())
    assert "?[31mred???" in text
    assert max(map(len, text.splitlines())) < 700
    assert "m" * 29 not in text.partition("slowest")[2]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_page_is_escaped_and_needs_nothing_else():
    bad = "<script>alert('x')</script><img src=//evil>&amp;\"{0}"
    ledger = Ledger(PRICES, [Budget(tokens=5, by="service_id"), Budget(tokens=5, by="model_name")])
    ledger.add_attempt(attempt(stage=bad, model=bad, service=bad, limit_type=bad, outcome="error"))
    ledger.add_attempt(attempt(stage=bad, model=bad, service=bad))
    ledger.add_operation(operation(stage=bad))
    text = ledger.summary(1.0).to_html()
    page = Page(text)
    assert page.tags == {
        *{"html", "head", "meta", "title", "style", "body", "h1", "table", "tr", "th", "td"},
    }
    assert page.attributes == {"lang", "charset", "name", "content"}
    assert page.text.count(bad) >= 5
    assert "color-scheme: light dark" in text
    assert not re.search(r"https?:|url\(|@import", text.partition("</style>")[0])


def test_the_page_of_nothing():
    assert Page(Ledger().summary().to_html()).text.count("nothing measured") == 2


# Settings


def write(text):
    path = Path("config/app.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_ledger_by_settings():
    write(
        """
        llm_prices: {large: {input: 2.5, output: 10}}
        llm_budgets: [{cost: 5, per: run}, {tokens: 2000000, per: day, by: service_id, overrides: {a: 5}}]
        llm_budget_ledger: day.json
        """
    )
    ledger = Settings().ledger()
    assert ledger.prices == {"large": LARGE}
    assert ledger.budgets == (Budget(cost=5), Budget(tokens=2e6, per="day", by="service_id", overrides={"a": 5}))
    ledger.add_attempt(attempt((5, 0)))
    ledger.close()
    assert "for service_id a is used up" in Settings().ledger().check(LLMTaskMeta(model_name="large", service_id="a"))


def test_without_settings_nothing_is_priced_or_bounded():
    ledger = Settings().ledger()
    assert (ledger.prices, ledger.budgets) == ({}, ())
    assert not list(Path().iterdir())


def test_prices_and_budgets_from_the_environment(monkeypatch):
    monkeypatch.setenv("SA_LLM_PRICES", '{"large": {"input": 2.5, "output": 10}}')
    monkeypatch.setenv("SA_LLM_BUDGETS", '[{"cost": 5}]')
    monkeypatch.setenv("SA_LLM_BUDGET_LEDGER", "null")
    ledger = Settings().ledger()
    assert (ledger.prices, ledger.budgets) == ({"large": LARGE}, (Budget(cost=5),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm_prices: {m: 3}", r"llm_prices\.m \(config/app.yaml\)"),
        ("llm_prices: {m: {input: 3}}", r"llm_prices\.m\.output .*required"),
        ("llm_prices: {m: {input: -3, output: 1}}", r"llm_prices\.m\.input .*greater than or equal to 0, got -3"),
        ("llm_prices: {m: {input: 0.0000001, output: 1}}", r"llm_prices\.m .*at least 0.000001"),
        ("llm_prices: {m: {input: 3, output: 1, cached: 1}}", r"llm_prices\.m\.cached .*not permitted"),
        ("llm_budgets: {cost: 5}", r"llm_budgets \(config/app.yaml\): .*tuple"),
        ("llm_budgets: [{per: run}]", r"llm_budgets\.0 \(config/app.yaml\): .*either of tokens or of cost"),
        ("llm_budgets: [{cost: 0}]", r"llm_budgets\.0\.cost .*greater than 0"),
        ("llm_budgets: [{cost: true}]", r"llm_budgets\.0\.cost .*got True"),
        ("llm_budgets: [{cost: 5, per: hour}]", r"llm_budgets\.0\.per .*'run' or 'day'.*got 'hour'"),
        ("llm_budgets: [{cost: 5, by: agent}]", r"llm_budgets\.0 .*not by labels; got by='agent'"),
        ("llm_budgets: [{cost: 5, by: stage, overrides: {x: 0}}]", r"llm_budgets\.0\.overrides\.x .*greater than 0"),
        ("llm_budgets: [{cost: 5}, {cost: 6}]", r"llm_budgets \(config/app.yaml\): two budgets of the same kind"),
        ("llm_budgt: []", r"line 1: unknown key llm_budgt \(did you mean llm_budgets\?\)"),
    ],
)
def test_bad_prices_and_budgets_are_refused_with_their_place(text, message):
    write(text)
    with pytest.raises(ConfigError, match=message):
        Settings()


def test_the_error_is_one_of_the_queue():
    assert issubclass(BudgetExceededError, QueueError)
