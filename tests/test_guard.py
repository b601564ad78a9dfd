"""Caps, what a sweep will use, and counting what it has used."""

import math
import re
from dataclasses import replace

import pytest

from llmq import Price
from llmq.core import Rate
from llmq.errors import ConfigError, LLMQError
from llmq.records import AttemptRecord
from llmq.tune import guard
from llmq.tune.guard import Caps, Extra, Prediction, Stopped, Used, checked_caps, predict

PRICES = {"small": Price(1.0, 10.0)}  # USD per million


def attempt(*, started=True, model="small", tokens=(None, None), response_model=None):
    return AttemptRecord(
        1, 1, None, model, None, None, 0.0, 0.0 if started else None, 1.0, "ok" if started else "cancelled",
        input_tokens=tokens[0], output_tokens=tokens[1], response_model=response_model,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["calls", "tokens", "cost", "minutes"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_cap_is_more_than_nothing_and_finite(name, value):
    with pytest.raises(ConfigError, match=f"the cap on {name} must be more than 0 and finite, got {value}"):
        Caps(**{name: value})


def test_no_caps_and_fractions_are_fine():
    assert Caps() == Caps(None, None, None, None)
    assert Caps(cost=0.5, minutes=0.1).cost == 0.5


def test_a_prediction_by_littles_law():
    """Levels 2, 4 and 2 again, at 0.5 s: 4, 8 and 4 calls/s, each for 10 s and two service times; twice that,
    and 10 s of 8 calls/s before."""
    found = predict([2, 4], service_seconds=0.5, window_seconds=10.0)
    assert found.calls == (4 + 8 + 4) * 11 * 3 + 80
    assert found.minutes == pytest.approx((3 * 11 * 3 + 10) / 60)
    assert (found.tokens, found.cost) == (None, None)
    assert predict([2], service_seconds=0.5, window_seconds=1.0).minutes * 60 == pytest.approx(2 + 4 + 30)


def test_what_a_sweep_may_add_is_twice_what_was_asked_for_and_half_a_minute_at_least():
    assert Extra.left(0, 4.0, 0.0, virtual=False) == Extra(12, 30.0)
    assert Extra.left(3, 140.0, 100.0, virtual=False) == Extra(9, 180.0)
    assert Extra.left(3, 140.0, 100.0, virtual=True) == Extra(27, clean_calls=10_000, coarseness=0.02)


def test_on_a_virtual_clock_what_a_sweep_may_add_is_bounded_in_windows():
    """Two levels and the first again, each of 100 calls, and 30 more such windows."""
    common = {"service_seconds": 1.0, "window_seconds": 1.0, "window_calls": 100}
    plain = predict([4, 4], refine=False, virtual=True, **common)
    assert plain == replace(predict([4, 4], refine=False, **common), virtual=True)
    warm_up = 2 * 4
    assert predict([4, 4], virtual=True, **common).calls - warm_up == 11 * (plain.calls - warm_up)


def test_caps_in_words():
    assert str(Caps(calls=400, cost=2.5)) == "400 calls or 2.50 USD"
    assert str(Caps()) == "no cap"


@pytest.mark.parametrize("caps", [500, {}, {"calls": 3}])
def test_what_are_no_caps_is_refused(caps):
    with pytest.raises(ConfigError, match=re.escape(f"llmq.tune.guard.Caps(calls=500, cost=2.0, ...), got {caps}")):
        checked_caps(caps)
    assert checked_caps(None) == Caps()


def test_a_prediction_with_calls_a_window_tokens_cost_and_a_known_rate():
    found = predict(
        [1, 8], service_seconds=1.0, window_seconds=10.0, window_calls=100, rate_per_second=4.0, tokens_per_call=200,
        cost_per_call=0.01,
    )  # fmt: skip
    seconds = [100 + 2, 100 / 4 + 2, 100 + 2]  # 1, 4 (not 8) and 1 call a second, until there are 100
    assert found.minutes == pytest.approx((sum(seconds) * 3 + 10) / 60)
    calls = (102 + 27 * 4 + 102) * 3 + 40
    assert (found.calls, found.tokens) == (math.ceil(calls), round(200 * calls))
    assert found.cost == pytest.approx(0.01 * calls)


def test_a_prediction_in_words():
    assert str(Prediction(120, 2.5)) == "up to about 120 calls, 2.5 minutes"
    assert str(Prediction(120, 2.5, 4000, 1.234)) == "up to about 120 calls, 2.5 minutes, 4000 tokens, 1.23 USD"
    assert str(Prediction(120, 2.5, 4000, 0.0031, virtual=True)).endswith(
        "2.5 virtual minutes, 4000 tokens, 0.0031 USD"
    )


def test_what_was_used_is_counted():
    used = Used(Caps(), PRICES)
    assert (used.tokens_per_call, used.cost_per_call) == (None, None)
    used.add_attempt(attempt(started=False))
    assert used.calls == 0, "it never got a slot, and was never sent"
    used.add_attempt(attempt())
    used.add_attempt(attempt(tokens=(100, 20)))
    used.add_attempt(attempt(model=None, response_model="small", tokens=(300, None)))
    assert (used.calls, used.tokens) == (3, 420)
    assert used.cost == pytest.approx((400 * 1 + 20 * 10) / 1e6)
    assert used.tokens_per_call == 210.0
    assert used.cost_per_call == pytest.approx(0.0003)
    used.add_attempt(attempt(model="other", tokens=(5, 5)))
    assert used.tokens == 430
    assert used.cost_per_call is None, "not every call has a price"


@pytest.mark.parametrize(
    ("caps", "met"),
    [
        (Caps(), None),
        (Caps(calls=3), None),
        (Caps(calls=2), "2 calls"),
        (Caps(tokens=241), None),
        (Caps(tokens=240), "240 tokens"),
        (Caps(cost=0.001), None),
        (Caps(cost=0.0006), "0.0006 USD"),
    ],
)
def test_a_cap_is_met(caps, met):
    used = Used(caps, PRICES)
    used.add_attempt(attempt(tokens=(100, 20)))
    used.add_attempt(attempt(tokens=(100, 20)))
    used.cost = 0.0006
    assert used.at_cap() == met
    if met is None:
        used.check_caps()
    else:
        with pytest.raises(Stopped, match=f"stopped at the cap of {met}"):
            used.check_caps()


def test_minutes_end_it_by_the_clock(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(guard, "clock", lambda: now)
    used = Used(Caps(minutes=0.5), {})
    assert used.ends_at == 1030.0
    now = 1029.9
    used.check_caps()
    assert used.minutes == pytest.approx(29.9 / 60)
    now = 1030.0
    with pytest.raises(Stopped, match="cap of 0.5 minutes"):
        used.check_caps()
    assert Used(Caps(), {}).ends_at == math.inf
    assert issubclass(Stopped, LLMQError)


def test_the_calls_that_are_left_hold_the_queue():
    used = Used(Caps(calls=3), {})
    used.add_attempt(attempt())
    (limit,) = used.limits()
    assert isinstance(limit, Rate)
    assert (limit.burst, limit.of) == (2, "requests")
    for _ in range(5):
        used.add_attempt(attempt())
    assert next(used.limits()).burst == 0
    assert list(Used(Caps(tokens=5), {}).limits()) == []
