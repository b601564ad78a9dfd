"""The pure core: decides what starts when. No clock, no event loop, no I/O; time is an argument."""

from llmq.core.jobs import Job, LLMTaskMeta, Outcome, Priority, State, Statistics
from llmq.core.scheduler import Scheduler

__all__ = ["Job", "LLMTaskMeta", "Outcome", "Priority", "Scheduler", "State", "Statistics"]
