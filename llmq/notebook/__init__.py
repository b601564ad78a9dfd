"""For Jupyter: `panel(queue)` to watch and steer a queue, `explorer(call_or_pipeline, items)` to measure by a button,
`run(work)` for cells without `await`. Interrupt is seen to wherever a queue is made in a kernel.

Importing this needs neither ipywidgets nor IPython.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.notebook.background import run
    from llmq.notebook.exploring import explorer
    from llmq.notebook.live import panel

_HOME = {
    "explorer": "llmq.notebook.exploring",
    "panel": "llmq.notebook.live",
    "run": "llmq.notebook.background",
}

__all__ = ["explorer", "panel", "run"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'llmq.notebook' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
