"""Run every notebook's source in a fresh kernel and write the executed .ipynb beside it."""

from pathlib import Path

import jupytext
import nbclient

for source in sorted(Path(__file__).parent.glob("[0-9]*.py")):
    notebook = jupytext.read(source)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    notebook.metadata.pop("jupytext", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this machine, different each time
    jupytext.write(notebook, source.with_suffix(".ipynb"))
    print(source.with_suffix(".ipynb"))
