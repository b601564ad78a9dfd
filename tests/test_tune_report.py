"""A sweep as a table and as a page."""

import re
from html.parser import HTMLParser

import pytest
from rich.table import Table

import llmq
from llmq.errors import ConfigError
from llmq.providers.chat import ChatRequest
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.tune.benchmarks import as_text
from llmq.tune.guard import Prediction
from llmq.tune.page import html_report, write_html
from llmq.tune.recommend import OperatingPoint
from llmq.tune.report import WIDTH, text_table
from llmq.virtual import VirtualLoop
from tests.test_plots import Measured, attempt, point, recorded

ANSWER = OperatingPoint(
    4,
    "requests",
    "The provider's limit binds.",
    requests_per_minute=295.0,
    goodput=4.9,
    goodput_low=4.8,
    goodput_high=5.0,
    share_429=0.0,
    share_429_high=0.009,
    level_low=3,
    level_high=6,
    confidence=0.9,
    waste="You run 16: 46 % of your limit.",
    next_steps=("Hold it.",),
    notes=("A note.",),
)


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def measured(**other):
    points = [
        point(4, 4.0, order=0, purpose="burst"),
        point(4, 4.0, order=1),
        point(4, 4.1, order=2, purpose="more"),
        point(8, 5.0, 0.4, order=3, succeeded=71),
        point(4, 4.9, order=4, requests_per_minute=295.0),
    ]
    return Measured(points, ANSWER, **other)


def test_the_table_has_intervals_settings_and_what_speaks_against_each():
    lines = text_table(measured()).splitlines()
    assert lines[0] == "demo"
    cells = [re.split(r"  +", line.strip()) for line in lines[3:]]
    assert [row[0] for row in cells[:5]] == ["4", "4", "4", "8", "4 at 295/min"]
    assert cells[3] == [
        "8", "5.00 ±0.50", "40.0% (32.0-41.0)", "8.0", "0.800 1.000*", "0.500 0.000*", "429 share over 1%",
    ]  # fmt: skip
    assert [row[-1] for row in cells[:2]] == ["on a burst, not counted", "more of it below"]
    assert cells[4][-1] == "<- recommended"
    assert lines[-1].strip() == "* of fewer than 72 calls: a rough figure"


def test_the_table_is_at_most_120_wide_whatever_the_pace():
    both = point(128, 123.456, 0.123, requests_per_minute=12345.6, tokens_per_minute=123456.0, service_p95=1234.5678)
    text = text_table(Measured([both], OperatingPoint(None, "requests", "x"), title="x" * 300))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "1234.568" in text
    assert "12.3%" in text


def test_a_title_is_no_markup():
    assert "[bold]x[/bold]" in text_table(measured(title="[bold]x[/bold]"))


def test_tables_are_text_in_a_notebook_too(monkeypatch):
    """There rich would show them, and not write them where they are asked for."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "at once" in text_table(measured())
    shown = Table("name")
    shown.add_row("benchmark")
    assert "benchmark" in as_text(shown)


def test_the_page_says_the_answer_first_and_why_and_how_sure():
    page = Page(html_report(measured(predicted=Prediction(1000, 2.0, cost=1.0), stopped="stopped at the cap of cost")))
    text = page.text
    words = [
        "Run 4 calls at once, paced at 295 requests/min.",
        "llm_queue_concurrency: 4",
        "The sweep stopped at the cap of cost.",
        "Why",
        "The provider's limit binds.",
        "You run 16: 46 % of your limit.",
        "How sure",
        "Confidence in this level: 90%.",
        "95 % interval of the level: 3 to 6.",
        "4.9 calls a second (95 % interval 4.8 to 5).",
        "A note.",
        "Hold it.",
        "about 1000 calls, 2.0 minutes, 1.00 USD",
        "Pictures",
        "All windows",
        "Words",
    ]
    places = [text.find(word) for word in words]
    assert -1 not in places, words[places.index(-1)]
    assert places == sorted(places)


def test_the_page_needs_nothing_else_and_escapes_everything():
    nasty = '<script>alert("x")</script>&\x07'
    found = html_report(measured(title=nasty, predicted=nasty, stopped=nasty))
    page = Page(found)
    assert "script" not in page.tags
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert '<script>alert("x")</script>&?' in page.text
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", found)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_every_picture_has_words_for_who_cannot_see_it():
    page = Page(html_report(measured()))
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == page.tags.count("img") == page.tags.count("figcaption") == 5
    assert "8: 5/s" in alts[0]
    assert "p95 of the service time" in alts[-1]


def test_pictures_of_calls_are_there_with_their_records_and_named_without():
    text = Page(html_report(measured())).text
    assert "Timeline at 4 at 295/min: records of its calls were not kept" in text
    calls = recorded(attempt(0, 1.0, service="a", stage="x"), attempt(1, 1.1, "rejected", service="a", stage="x"))
    page = Page(html_report(measured(records={4: calls, 3: calls})))
    assert page.tags.count("img") == 8
    assert "Left out" not in page.text
    alts = [value for _, name, value in page.attributes if name == "alt"]
    assert "Timeline at 8: at most 1 in flight, 1 refusals" in alts


def test_a_sweep_that_recommends_nothing_says_so():
    found = measured()
    found.answer = OperatingPoint(None, "requests", "Even the lowest level is refused.", next_steps=("Lower levels.",))
    text = Page(html_report(found)).text
    assert "No level can be recommended." in text
    assert "llm_queue_concurrency" not in text
    assert "Lower levels." in text


def test_a_sweep_without_a_window_has_a_page():
    text = Page(html_report(Measured([], OperatingPoint(None, "unknown", "Nothing yet.")))).text
    assert "no window counts yet" in text


def test_what_was_done_is_told():
    found = measured()
    found.points[3].cpu_share, found.points[3].loop_lag_p99 = 0.4, 0.002
    found.points[3].limited_by = "client"
    for each in found.points:
        each.cost = 0.5
    text = Page(html_report(found)).text
    assert "processor at most 40% of a core, event-loop lag p99 at most 2.0 ms; it was the limit at 8" in text
    assert "4 (on a burst), 4, 4 (more of it), 8, 4 at 295/min" in text
    assert "2.50 USD" in text
    found.points[0].cost = None
    assert "cost not known" in Page(html_report(found)).text


def test_a_page_is_written_or_the_reason_told(tmp_path):
    write_html(measured(), tmp_path / "sweep.html")
    assert (tmp_path / "sweep.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ConfigError, match="cannot write to"):
        write_html(measured(), tmp_path / "none" / "sweep.html")


def test_an_open_loop_says_so():
    found = measured()
    assert "a closed loop" in Page(html_report(found)).text
    found.points[1].offered_rate = 4.0
    assert "calls came at 4 a second whatever became of them" in Page(html_report(found)).text


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualLoop})], ids=["virtual"])
async def test_a_real_sweep_has_a_page_with_all_its_pictures(anyio_backend):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1, requests_per_minute=300, bucket_seconds=5))

    async def call(item):
        return await provider.complete(ChatRequest("m", [{"role": "user", "content": str(item)}]))

    found = await llmq.sweep(call, range(1000), [2, 4, 8], seconds=20, title="m", on_progress=lambda _: None)
    page = Page(html_report(found))
    setting = found.recommend().setting
    assert f"Run {setting.level} calls at once" in page.text
    assert sum("<- recommended" in line for line in str(found).splitlines()) == 1
    assert page.tags.count("img") == 7
    assert "Calls by service: no record of a call has a service_id" in page.text
