"""The pure core: decides what starts when. No clock, no event loop, no I/O; time is an argument."""

from llmq.core.capacity import Cap, Depth
from llmq.core.jobs import NO_META, Counts, Drop, FrontJob, Job, LLMTaskMeta, Outcome, Pass, Priority, State, Statistics
from llmq.core.policy import FairShare, Overflow, Policy
from llmq.core.rates import Rate
from llmq.core.scheduler import Scheduler

__all__ = [
    "NO_META",
    "Cap",
    "Counts",
    "Depth",
    "Drop",
    "FairShare",
    "FrontJob",
    "Job",
    "LLMTaskMeta",
    "Outcome",
    "Overflow",
    "Pass",
    "Policy",
    "Priority",
    "Rate",
    "Scheduler",
    "State",
    "Statistics",
]
