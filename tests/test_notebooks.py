"""The notebooks, run in a real kernel; each ends in an assert on what it claims.

The cheap ones always, the others with `-m notebooks`. `make notebooks` runs them all and writes the .ipynb.
"""

import time
from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))
SMOKE = ("00", "05", "07")
LARGEST_BYTES = 500_000
RUNS = [
    pytest.param(source, id=source.stem, marks=[] if source.name.startswith(SMOKE) else pytest.mark.notebooks)
    for source in SOURCES
]


def run(notebook, folder):
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return notebook


@pytest.fixture(autouse=True)
def _quiet_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))


@pytest.mark.alone
@pytest.mark.parametrize("source", RUNS)
# Jupyter's own start-up on Python 3.11 leaves warnings that are not ours to mend.
@pytest.mark.filterwarnings("default")
def test_a_notebook_runs_and_what_it_claims_holds(source, tmp_path):
    notebook = run(jupytext.read(source), str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture appears"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_executed_notebook_is_in_step_with_its_source(source):
    executed = jupytext.read(source.with_suffix(".ipynb"))
    assert [c.source for c in executed.cells] == [c.source for c in jupytext.read(source).cells]
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "every cell has been run"
    assert "widgets" not in executed.metadata


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_an_executed_notebook_is_small_and_shows_nothing_of_this_machine(source):
    executed = source.with_suffix(".ipynb")
    assert executed.stat().st_size < LARGEST_BYTES
    code = [cell for cell in jupytext.read(executed).cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    shown = [text for output in outputs for kind, text in _texts(output) if not kind.startswith("image/")]
    assert not [text for text in shown if any(start in text for start in ("/tmp/", "/home/", "/root/", "/Users/"))]
    assert any("assert " in cell.source for cell in code[-3:]), "it ends in an assert on what it claims"


def _texts(output):
    return [("text/plain", output.text)] if "text" in output else list(output.get("data", {}).items())


READERS_OWN = """
import llmq
from openai import AsyncOpenAI
client = AsyncOpenAI(base_url=URL, api_key="none", max_retries=0)
async def ask(prompt):
    answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
    return answer.choices[0].message.content
async def outline(topic):
    return await ask(f"Outline: {topic}")
async def draft(topic, outline):
    return await ask(f"Draft on {topic}: {outline}")
async def title(topic, draft):
    return await ask(f"Title: {draft}")
sweep = await llmq.sweep(llmq.Pipeline([outline, draft, title]), ["tea", "rain"], [1, 2, 4, 8], seconds=1.5)
print(sweep.recommend())
""".strip()


@pytest.mark.alone
@pytest.mark.filterwarnings("default")
def test_a_readers_own_generator_takes_15_lines_to_a_recommendation(tmp_path):
    """Three stages with the reader's own client, in a fresh kernel."""
    from llmq.testing import serve_provider

    assert len(READERS_OWN.splitlines()) <= 15
    import nbformat

    with serve_provider(latency_seconds=0.3) as provider:
        cells = [nbformat.v4.new_code_cell(text) for text in (f"URL = {provider.url!r}", READERS_OWN)]
        began = time.monotonic()
        notebook = run(nbformat.v4.new_notebook(cells=cells), str(tmp_path))
        print(f"recommendation after {time.monotonic() - began:.1f} s")
    text = "".join(o.get("text", "") for o in notebook.cells[1]["outputs"])
    assert "llm_queue_concurrency: 8" in text.splitlines() or "client" in text, text
