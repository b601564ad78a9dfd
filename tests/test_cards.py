"""What a notebook shows of queue, statistics, sweep and operating point: tables that need nothing else."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import anyio
import pytest

from llmq import LLMQueue, LLMTaskMeta, Sweep
from llmq.cards import MOST_ROWS, data_table
from llmq.tune.recommend import OperatingPoint
from tests.windows import point

SWEEP = Sweep([point(n, g, error=0.005) for n, g in ((1, 5.0), (2, 9.95), (4, 10.0))], title="tea & <b>rain</b>")
NASTY = "<script>alert(1)</script>"


class _Text(HTMLParser):
    """Texts of cells by row; fails on a tag that is left open."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.tags, self.plain = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.plain.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def parsed(html):
    found = _Text()
    found.feed(html)
    found.close()
    assert found.open == []
    assert found.tags <= {"div", "b", "table", "tr", "th", "td", "svg", "polyline", "br", "small", "pre"}
    assert not re.search(r"https?:|src=|href=|[; \"](color|background):(?!none)", html), "no resource and no colour"
    return found


def facts(html):
    return {row[0]: row[1] for row in parsed(html).rows if len(row) == 2}


@pytest.mark.anyio
async def test_a_queue_shows_its_state_and_escapes_names():
    queue = LLMQueue(2, telemetry=None)
    meta = LLMTaskMeta(model_name=NASTY)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(lambda: queue.submit(lambda: anyio.sleep(5.0), meta=meta))
        await anyio.sleep(1.0)
        shown = facts(queue._repr_html_())
        assert shown["in flight"] == "2 of 2"
        assert shown["waiting"] == "1, the oldest for 1.0 s"
        assert shown["state"] == "open"
        assert shown["the oldest waiter"] == "waits for one of 2 slots, all taken"
        queue.pause()
        assert facts(queue._repr_html_())["in flight"] == "2 of 2, paused"
        queue.resume()
        statistics = queue.statistics()
    assert facts(statistics._repr_html_())["in flight"] == "2 of 2", "the moment it was asked"
    ended = facts(queue._repr_html_())
    assert ended["ended"] == "3 succeeded"
    assert "the oldest waiter" not in ended


@pytest.mark.anyio
async def test_statistics_have_a_table_by_key_where_there_are_several():
    queue = LLMQueue(2, telemetry=None)
    for name in (NASTY, "m", "m"):
        await queue.submit(lambda: anyio.sleep(0), meta=LLMTaskMeta(model_name=name))
    html = queue.statistics()._repr_html_()
    assert "<script" not in html
    assert ["m", "0", "0", "2"] in parsed(html).rows
    assert [NASTY, "0", "0", "1"] in parsed(html).rows


def test_a_sweep_shows_its_windows_and_its_answer():
    found = parsed(SWEEP._repr_html_())
    assert "tea & <b>rain</b>" in found.plain
    assert [row[0] for row in found.rows] == ["at once", "1", "2", "4"]
    assert found.rows[2][-1] == "<- recommended"
    assert found.plain[-1] == "Recommended: 2 calls at once."


def test_a_sweep_with_nothing_measured_says_so():
    assert "Nothing has been measured yet." in parsed(Sweep([])._repr_html_()).plain


def test_an_operating_point_shows_the_settings_and_the_reason():
    answer = SWEEP.recommend()
    found = parsed(answer._repr_html_())
    shown = {row[0]: row[1] for row in found.rows}
    assert found.plain[0] == "Recommended: 2 calls at once."
    assert answer.reason in found.plain
    assert shown["goodput"].startswith("9.95 calls/s (95 % interval 9.85 to 10")
    assert "llm_queue_enabled: true\nllm_queue_concurrency: 2\n" in answer._repr_html_()


def test_a_refusal_to_recommend_shows_what_to_do():
    refusal = OperatingPoint(None, "errors", f"All failed: {NASTY}", next_steps=("Look at the errors.",))
    found = parsed(refusal._repr_html_())
    assert found.rows == []
    assert found.plain == ["No level can be recommended.", f"All failed: {NASTY}", "Look at the errors."]


def test_a_long_table_is_cut_and_says_so():
    found = parsed(data_table(("key", "n"), [(str(n), "1") for n in range(MOST_ROWS + 7)]))
    assert len(found.rows) == 1 + MOST_ROWS
    assert found.plain[-1] == "and 7 more"


def test_cards_load_neither_ipywidgets_nor_ipython():
    code = (
        "import sys, llmq; llmq.LLMQueue(2)._repr_html_(); "
        "print([n for n in ('ipywidgets', 'IPython', 'llmq.notebook', 'pandas', 'matplotlib') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
