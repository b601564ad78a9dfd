"""A real Prometheus server scrapes llmq, and answers every query of the dashboard and of the rules.

Not collected where no Prometheus server is installed; `make receivers` installs it. See conftest.py.
"""

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

HOME = Path(__file__).parent.parent
RULES = HOME / "config" / "prometheus" / "llmq.rules.yml"
DASHBOARD = json.loads((HOME / "config" / "grafana" / "llmq.json").read_text())
DEADLINE_SECONDS = 90

QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
ENTRIES = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
RECORDED = {rule["record"]: rule["expr"] for rule in ENTRIES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in ENTRIES if "alert" in rule}


@contextlib.contextmanager
def running(command, ends_with, **options):
    """A process that is asked to stop in the end, and made to if it does not."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        try:
            process.stdin.close()
            if ends_with is not None:
                process.send_signal(ends_with)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Prometheus:
    """The HTTP API of a server."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path, **query):
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def ask(self, expr):
        """[(labels, value)] of an instant query, without what is not a number."""
        answer = self.get("/api/v1/query", query=expr)
        assert answer["resultType"] == "vector"
        rows = [({**row["metric"]}, float(row["value"][1])) for row in answer["result"]]
        return [(labels, value) for labels, value in rows if not math.isnan(value)]

    def wait_for(self, expr, good=bool):
        """The answer to a query, as soon as it is good."""
        ends_at, answer = time.monotonic() + DEADLINE_SECONDS, None
        while time.monotonic() < ends_at:
            with contextlib.suppress(OSError):  # not listening yet
                answer = self.ask(expr)
                if good(answer):
                    return answer
            time.sleep(0.1)
        raise AssertionError(f"after {DEADLINE_SECONDS} s {expr} is {answer}")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """A server with our rules that scrapes a process at work."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    workload = [sys.executable, str(HOME / "tests" / "receivers_workload.py")]
    with running(workload, None, stdout=subprocess.PIPE, cwd=folder) as process:
        target = f"127.0.0.1:{int(process.stdout.readline())}"
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "llmq", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        server = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        with running(server, signal.SIGTERM):
            yield Prometheus(port)
        process.stdin.close()
        assert process.wait(60) == 0, "the workload met an error that it did not expect"


@pytest.mark.parametrize(("title", "expr"), QUERIES)
def test_every_query_of_the_dashboard_is_answered(prometheus, title, expr):
    assert prometheus.wait_for(expr), title


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_expression_is_answered_and_recorded(prometheus, name):
    assert prometheus.wait_for(RECORDED[name])
    assert prometheus.wait_for(name)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alerts_expression_is_answered_where_its_situation_is_true(prometheus, name):
    expr = ALERTS[name]["expr"]
    threshold = re.fullmatch(r"(\S+) > [\d.]+", expr)
    if threshold:  # promtool's tests are of the number
        expr = threshold[1]
        assert expr in RECORDED
    assert prometheus.wait_for(expr)


def test_only_the_stuck_queue_is_stuck_and_only_the_spent_model_out_of_quota(prometheus):
    prometheus.wait_for("sum(rate(llm_queue_completed_total{queue='llmq'}[5m])) > 0")
    stuck = prometheus.wait_for(ALERTS["LlmqStuck"]["expr"], lambda rows: [r[0]["queue"] for r in rows] == ["stuck"])
    assert stuck[0][1] == 1, "one call waits"
    spent = prometheus.wait_for(ALERTS["LlmqOutOfQuota"]["expr"])
    assert [labels["model_name"] for labels, _ in spent] == ["spent"]


def test_prometheus_reads_what_happened(prometheus):
    def labels_of(expr, name, wanted):
        return prometheus.wait_for(expr, lambda rows: {labels.get(name) for labels, _ in rows} >= set(wanted))

    labels_of("llm_queue_completed_total", "outcome", ["ok", "error", "timeout", "cancelled", "queue_full", "rejected"])
    labels_of("llm_queue_rate_limited_total", "limit_type", ["requests", "quota"])
    labels_of("llm_queue_retry_delay_seconds_count > 0", "source", ["retry_after", "backoff"])
    labels_of("llm_queue_ratelimit_remaining", "dimension", ["requests"])
    prometheus.wait_for("gen_ai_client_operation_time_to_first_chunk_seconds_count > 0")
    limit = prometheus.wait_for('llm_queue_limit{queue="llmq"}', lambda rows: rows and rows[0][1] == 6)
    assert len(limit) == 1, "the caps of all queues of that name together"
    busiest = prometheus.ask('max_over_time(sum(llm_queue_inflight{queue="llmq"})[5m:500ms])')
    assert 0 <= busiest[0][1] <= 6
    names = set(prometheus.get("/api/v1/label/__name__/values"))
    ours = {name for name in names if name.startswith("llm_queue")}
    assert not {name for name in ours if name.endswith("_ratio") or "_call" in name}, "units leaked into names"
    forbidden = {"service_id", "request_id"}
    assert not forbidden & set(prometheus.get("/api/v1/labels"))


def test_rules_and_configuration_pass_promtool():
    for command in (
        ["check", "rules", RULES],
        ["check", "config", RULES.with_name("prometheus.yml")],
        ["test", "rules", RULES.with_name("llmq.rules.test.yml")],
    ):
        found = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout + found.stderr


def test_each_alert_is_tested_and_says_what_to_do():
    tests = RULES.with_name("llmq.rules.test.yml").read_text()
    lines = RULES.read_text().splitlines()
    for name, alert in ALERTS.items():
        assert tests.count(f"alertname: {name}") >= 3
        assert alert["annotations"].keys() == {"summary", "action"}
        assert lines[lines.index(f"      - alert: {name}") - 1].startswith("      # ")


def test_the_dashboard_is_one_that_grafana_imports():
    assert DASHBOARD["schemaVersion"] >= 36
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    panels = DASHBOARD["panels"]
    assert len(panels) == 10
    assert len({panel["id"] for panel in panels}) == 10
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == 10
    for panel in panels:
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
