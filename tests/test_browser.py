"""What a reader sees and does: the notebooks and widgets in a real JupyterLab, in Chromium.

What a widget has really done is read at the provider: this process serves it, the notebook only has its address.
With LLMQ_SCREENSHOTS=docs/images these tests write the docs' screenshots.
"""

import shutil

import pytest
from selenium.webdriver.common.by import By

from tests.lab import ROOT, Notebook, chromium, jupyter_lab

QUICKSTART = "00_quickstart.ipynb"


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
