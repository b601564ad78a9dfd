"""Every test starts in an empty folder, with no setting in the environment and no queue in the process."""

import os
import random

import pytest
import trio.testing
from hypothesis import settings

from llmq.runtime import RuntimeEnv
from llmq.virtual import VirtualLoop

settings.register_profile("llmq", deadline=None)
settings.load_profile("llmq")

BACKENDS = ["asyncio", "trio"]


@pytest.fixture(params=BACKENDS)
def anyio_backend(request):
    """Virtual time on both backends."""
    if request.param == "asyncio":
        return "asyncio", {"loop_factory": VirtualLoop}
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.fixture(autouse=True)
def _hermetic(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(7)  # of the back-off
    for name in list(os.environ):
        if name.startswith("SA_") or name in ("OPENAI_API_KEY", "LOGFIRE_TOKEN"):
            monkeypatch.delenv(name)
    RuntimeEnv.reset()
    yield
    RuntimeEnv.reset()
