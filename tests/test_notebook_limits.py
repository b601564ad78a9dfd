"""Half the provider's limit in 01 and 02: the answers move with it, and what the notebooks claim still holds."""

import re
from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LIMIT = 600


def answer(notebook):
    """Calls at once and requests a minute of the first recommendation that is printed."""
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    found = re.search(r"llm_queue_concurrency: (\d+)\nllm_queue_requests_per_minute: (\d+)\n", text)
    assert found, text
    return int(found[1]), int(found[2])


@pytest.fixture(autouse=True)
def _quiet_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))


@pytest.mark.parametrize("name", ["01_find_the_knee", pytest.param("02_rate_limit_lab", marks=pytest.mark.notebooks)])
@pytest.mark.filterwarnings("default")  # Jupyter's own start-up
def test_the_answer_moves_with_the_limit(name, tmp_path):
    source = (NOTEBOOKS / f"{name}.py").read_text()
    line = f"\nREQUESTS_PER_MINUTE = {LIMIT}\n"
    assert source.count(line) == 1
    halved = jupytext.reads(source.replace(line, f"\nREQUESTS_PER_MINUTE = {LIMIT // 2}\n"), fmt="py:percent")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(halved, timeout=300, kernel_name="python3", resources=resources).execute()
    level, pace = answer(jupytext.read(NOTEBOOKS / f"{name}.ipynb"))
    half_level, half_pace = answer(halved)
    print(f"{level} at {pace} a minute, with half the limit {half_level} at {half_pace}")
    assert 0.95 * LIMIT <= pace <= LIMIT
    assert 0.95 * LIMIT / 2 <= half_pace <= LIMIT / 2
    assert 0.4 * level <= half_level <= 0.75 * level
