"""What a reader sees and does: the notebooks and widgets in a real JupyterLab, in Chromium.

What a widget has really done is read at the provider: this process serves it, the notebook only has its address.
With LLMQ_SCREENSHOTS=docs/images these tests write the docs' screenshots.
"""

import re
import shutil

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from llmq.testing import serve_provider
from tests.lab import ROOT, Notebook, chromium, jupyter_lab, wait_until

pytestmark = pytest.mark.alone

QUICKSTART = "00_quickstart.ipynb"

OWN_CLIENT = "client = AsyncOpenAI(base_url={url!r}, api_key='none-needed', max_retries=0)"
PANEL = """
import asyncio
from itertools import count

from llmq.notebook import panel

queue = llmq.LLMQueue(2)


async def run_pipeline():
    with llmq.using(queue):
        async with pipeline.run(f"topic {n}" for n in count()) as outcomes:
            async for outcome in outcomes:
                pass


running = asyncio.create_task(run_pipeline())
shown = panel(queue)
shown
""".strip()
PANEL_ENDS = """
shown.close()
running.cancel()
await asyncio.wait([running])
""".strip()
EXPLORER = """
from llmq.notebook import explorer

explorer(pipeline, ["tea", "rain"], [1, 2, 4], seconds=3, refine=False, max_429_ratio=0.2, max_error_ratio=0.2)
""".strip()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A copy of the quickstart as it is shipped, run in JupyterLab."""
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder) as address, chromium(folder) as driver:
        shutil.copy(ROOT / "notebooks" / QUICKSTART, folder / "notebooks")
        notebook = Notebook(driver, address % QUICKSTART)
        notebook.command("notebook:clear-all-cell-outputs")
        assert not driver.find_elements(By.CSS_SELECTOR, ".jp-Notebook img"), "the pictures seen are new"
        notebook.run_all()
        yield notebook


def test_the_quickstart_ends_in_a_picture_and_a_recommendation(quickstart):
    answer = quickstart.find(".jp-OutputArea-output", "Recommended:")
    assert "llm_queue_concurrency" in answer.text
    picture = quickstart.find(".jp-OutputArea-output img")
    assert int(picture.get_property("naturalWidth")) > 400
    quickstart.screenshot("lab-quickstart", picture)


def test_the_panel_steers_what_the_provider_sees(quickstart):
    with serve_provider(latency_seconds=0.25) as provider:
        quickstart.run(OWN_CLIENT.format(url=provider.url))
        cell = quickstart.run(PANEL)
        try:
            wait_until("2 in flight at the provider", lambda: provider.stats()["in_flight"] == 2)
            assert most_in_flight(provider, requests=8) == 2

            slider = quickstart.in_view(quickstart.find(".widget-slider .noUi-handle", within=cell))
            slider.send_keys(Keys.ARROW_RIGHT * 4)
            wait_until("6 in flight at the provider", lambda: provider.stats()["in_flight"] == 6)
            assert most_in_flight(provider, requests=24) == 6
            quickstart.wait("the panel tells so", lambda: "6 of 6" in cell.text)
            quickstart.screenshot("lab-panel", quickstart.output(cell))

            slider.send_keys(Keys.ARROW_LEFT * 3)
            wait_until("3 in flight at the provider", lambda: provider.stats()["in_flight"] == 3)
            assert most_in_flight(provider, requests=12) == 3

            quickstart.button("pause", cell).click()
            wait_until("silence at the provider", lambda: provider.stats()["in_flight"] == 0)
            requests = provider.stats()["requests"]
            paused = quickstart.wait("the panel says why", lambda: waits_for_resume(cell))
            quickstart.wait("two more seconds", lambda: (waits_for_resume(cell) or 0) >= paused + 2)
            assert provider.stats()["requests"] == requests

            quickstart.button("resume", cell).click()
            wait_until("3 in flight at the provider", lambda: provider.stats()["in_flight"] == 3)
            assert most_in_flight(provider, requests=12) == 3
        finally:
            quickstart.run(PANEL_ENDS)


def test_the_explorer_calls_nothing_before_its_button_and_ends_in_the_operating_point(quickstart):
    with serve_provider(latency_seconds=0.15) as provider:
        quickstart.run(OWN_CLIENT.format(url=provider.url))
        cell = quickstart.run(EXPLORER)
        measure = quickstart.button("Measure", cell)
        assert provider.stats()["requests"] == 0
        assert "Nothing has been called yet" in cell.text
        assert bar_share(cell) == 0

        measure.click()
        wait_until("a request", lambda: provider.stats()["requests"] > 0)
        quickstart.wait("the bar moves", lambda: 0 < bar_share(cell) < 100)
        quickstart.wait("the bar's end", lambda: bar_share(cell) == 100)
        answer = quickstart.wait("its answer", lambda: re.search("(Recommended|No level).*", cell.text))
        assert answer[0].startswith("Recommended: 4 calls at once"), cell.text
        assert "llm_queue_concurrency" in cell.text
        assert provider.stats()["peak_in_flight"] == 4
        quickstart.find(".widget-html", "Done.", cell)
        quickstart.find(".widget-html", "calls at once", cell)
        quickstart.screenshot("lab-explorer", quickstart.output(cell))


def most_in_flight(provider, *, requests):
    """The most in flight at the provider while it gets that many more requests."""
    until = provider.stats()["requests"] + requests
    seen = []

    def has_got_them():
        stats = provider.stats()
        seen.append(stats["in_flight"])
        return stats["requests"] >= until

    wait_until(f"{requests} more requests", has_got_them)
    return max(seen)


def waits_for_resume(cell):
    """For how many seconds the oldest waiter has waited, as the panel of a paused queue says it; at least 1."""
    found = re.search(r"for (\d+) s: waits for resume\(\)", cell.text)
    return found and int(found[1])


def bar_share(cell):
    """How far the progress bar is, in per cent."""
    style = cell.find_element(By.CSS_SELECTOR, ".progress-bar").get_attribute("style")
    return round(float(re.search(r"width: ([\d.]+)%", style)[1]))
