"""Benchmarks measure; they assert no time. Ratios within one run mean something, absolutes little."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for measure.py, which the scripts beside it import, too

from llmq import RuntimeEnv
from llmq.virtual import VirtualLoop


@pytest.fixture
def runner():
    with asyncio.Runner() as found:
        yield found
    RuntimeEnv.reset()


@pytest.fixture
def virtual_runner():
    with asyncio.Runner(loop_factory=VirtualLoop) as found:
        yield found
    RuntimeEnv.reset()
