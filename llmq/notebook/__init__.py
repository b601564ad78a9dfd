"""Widgets for Jupyter: `panel(queue)` to watch and steer a queue.

Importing this needs neither ipywidgets nor IPython.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.notebook.live import panel

_HOME = {"panel": "llmq.notebook.live", "explorer": "llmq.notebook.explorer"}

__all__ = ["panel"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'llmq.notebook' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
