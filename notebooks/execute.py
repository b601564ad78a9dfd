"""Run the sources in fresh kernels and write the executed .ipynb beside each; stops at the first error.

`python notebooks/execute.py` runs all of them, `python notebooks/execute.py 01 03` those whose names begin so.
"""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient

wanted = tuple(sys.argv[1:])
for source in sorted(Path(__file__).parent.glob("[0-9]*.py")):
    if wanted and not source.name.startswith(wanted):
        continue
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:  # where there are no settings that would count
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # else it is another one each time
        cell.metadata.pop("execution", None)  # times of this machine
    jupytext.write(notebook, source.with_suffix(".ipynb"))
    print(source.with_suffix(".ipynb"), flush=True)
