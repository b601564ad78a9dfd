"""What a run reports, and how it stops when a budget is used up."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmq.cli import app
from llmq.generators.plateaus import CALLS_PER_SERVICE
from llmq.generators.services import sample_services
from llmq.providers.simulated import SimulatedProvider

SERVICES = 3
CALLS = SERVICES * CALLS_PER_SERVICE


@pytest.fixture
def provider(monkeypatch):
    """The providers that runs have asked, the newest last."""
    made = []

    def make(spec):
        made.append(SimulatedProvider(spec))
        return made[-1]

    monkeypatch.setattr("llmq.providers.open.SimulatedProvider", make)
    return made


def run(*arguments, code=0, services=SERVICES, **settings):
    """`llmq run` in this process."""
    Path("services.jsonl").write_text("".join(f"{json.dumps(s.model_dump())}\n" for s in sample_services()[:services]))
    settings = {"simulate": {"latency_seconds": 0.001}, "llm_queue_concurrency": 4, "concurrency": 2, **settings}
    Path("app.yaml").write_text(json.dumps(settings))
    found = CliRunner().invoke(
        app, ["run", "--services", "services.jsonl", "--out", "out.jsonl", "--config", "app.yaml", *arguments]
    )
    assert found.exit_code == code, found.output
    return found.output


def report(out="out.jsonl"):
    return json.loads(Path(f"{out}.report.json").read_text())


def tokens(found):
    return found["usage"]["input_tokens"] + found["usage"]["output_tokens"]


def test_the_report_is_printed_and_saved_and_equal_with_the_flag_off_and_on():
    found = []
    for enabled in (False, True):
        output = run(llm_queue_enabled=enabled)
        saved = report()
        page = Path("out.jsonl.report.html").read_text()
        assert f"{CALLS} calls sent" in output
        assert re.search(rf"Calls +{CALLS} in .* s: ok {CALLS}\n", output)
        assert f"{saved['usage']['input_tokens']:,} in, {saved['usage']['output_tokens']:,} out" in output
        assert f"{saved['usage']['input_tokens']:,} in" in page
        assert saved["attempts"] == CALLS
        assert saved["usage"]["attempts_with_unknown_tokens"] == 0
        slowest = sorted((stage["stage"], stage["calls"], stage["usage"]["input_tokens"]) for stage in saved["slowest"])
        found.append((saved["calls"], saved["calls_by_outcome"], saved["usage"], slowest))
        for path in Path().glob("out.jsonl*"):
            path.unlink()
    assert found[0] == found[1]


@pytest.mark.parametrize("enabled", [False, True])
def test_a_budget_stops_the_run_and_what_is_in_flight_finishes_and_a_resumed_run_does_the_rest(
    enabled, provider, caplog
):
    run(llm_queue_enabled=enabled)
    whole = tokens(report())
    for path in Path().glob("out.jsonl*"):
        path.unlink()
    caplog.clear()
    budget = [{"tokens": whole // 2}]
    output = run(llm_queue_enabled=enabled, llm_budgets=budget, code=1)
    assert "Stopped, with" in output
    assert f"the budget of {whole // 2:,} tokens per run is used up" in output
    asked = provider[-1].stats()
    assert asked["by_status"] == {"200": asked["requests"]}, "no call was given up half-way"
    saved = report()
    assert whole // 2 <= tokens(saved) < whole
    assert saved["calls_by_outcome"]["ok"] == asked["requests"]
    (used,) = saved["budgets"]
    assert (used["used"], used["limit"]) == (tokens(saved), whole // 2)
    assert Path("out.jsonl.quarantine.jsonl").read_text() == ""
    told = [(r.levelname, r.event, r.share) for r in caplog.records if r.name == "llmq" and r.event == "budget"]
    assert told == [("WARNING", "budget", 0.8), ("ERROR", "budget", 1.0)]

    output = run("--resume", llm_queue_enabled=enabled)
    assert len(Path("out.jsonl").read_text().splitlines()) == SERVICES
    assert Path("out.jsonl.quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("enabled", [False, True])
def test_the_days_totals_go_on_in_the_next_run(enabled):
    day = {"llm_budgets": [{"tokens": 10**9, "per": "day"}], "llm_budget_ledger": "day.json"}
    run(llm_queue_enabled=enabled, **day)
    (first,) = report()["budgets"]
    assert first["used"] == tokens(report())
    for path in Path().glob("out.jsonl*"):
        path.unlink()
    run(llm_queue_enabled=enabled, **day)
    (second,) = report()["budgets"]
    assert second["used"] == 2 * first["used"]
    assert json.loads(Path("day.json").read_text())["totals"][0]["used"] == second["used"]
    for path in Path().glob("out.jsonl*"):
        path.unlink()
    output = run(llm_queue_enabled=enabled, code=1, **{**day, "llm_budgets": [{"tokens": first["used"], "per": "day"}]})
    assert "wait for the next day at 00:00 UTC" in output
    assert report()["calls_by_outcome"].get("ok", 0) == 0


@pytest.mark.parametrize("enabled", [False, True])
def test_a_services_own_budget_stops_that_service_and_no_other(enabled, provider):
    first = sample_services()[0].service_id
    budget = {"tokens": 10_000_000, "per": "run", "by": "service_id", "overrides": {first: 300}}
    output = run(llm_queue_enabled=enabled, llm_budgets=[budget], code=1)
    assert f"{SERVICES - 1} services finished" in output
    assert f"for service_id {first}" in output
    assert "with 1 left to do" in output
    assert not Path("out.jsonl.quarantine.jsonl").read_text()
