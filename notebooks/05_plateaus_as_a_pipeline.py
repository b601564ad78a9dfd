# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Plateaus as a pipeline
#
# Real work is seldom one call. The plateau generator describes a service at five levels of maturity: one call for
# the `descriptions`, then for each of five plateaus one call for its `features`, then three calls for a `mapping` of
# these features to a catalogue each. 21 calls a service, and a mapping needs nothing but its own features.
#
# This notebook runs it twice over the same services, with llmq's flag off and on, and draws who did what when. The
# provider is simulated, on a clock of its own: minutes take a second, and nothing is paid.

# %%
SERVICES = 12
CONCURRENCY = 3
LLM_QUEUE_CONCURRENCY = 12

# %% [markdown]
# `CONCURRENCY` is how many services are worked on at once, `LLM_QUEUE_CONCURRENCY` how many *calls* may run at once
# when the queue is on. A call takes 2 s here, and the features of plateau 3 take three times as long, so that there is
# something to wait for.

# %%
import asyncio
import itertools
import tempfile
from pathlib import Path

import pandas as pd

import llmq
from llmq.generators.run import run_services
from llmq.generators.services import read_catalogues, repeated, sample_services
from llmq.testing import ProviderSpec, SimulatedProvider, in_virtual_time
from llmq.tune.recorder import RecordingLedger
from llmq.tune.timelines import plot_gantt, plot_timeline
from llmq.tune.trace import records_of

services = list(itertools.islice(repeated(sample_services()), SERVICES))
folder = tempfile.TemporaryDirectory()


async def generate(name, settings):
    """Run the generator in virtual time. Returns its lines, when each was there (s), and what was recorded."""
    llmq.RuntimeEnv.reset()
    queue = llmq.RuntimeEnv.initialize(settings).llm_queue
    out = Path(folder.name) / name
    ledger = RecordingLedger(settings)  # keeps what is sent without a queue
    done_seconds = []

    async def run():
        began_at = asyncio.get_running_loop().time()
        await run_services(
            services,
            out,
            client=SimulatedProvider(ProviderSpec(latency_seconds=2, slow_stages={"features_3": 3})),
            catalogues=read_catalogues(),
            settings=settings,
            ledger=ledger,
            on_done=lambda report: done_seconds.append(asyncio.get_running_loop().time() - began_at),
        )

    await in_virtual_time(run)  # a clock that jumps to the next event
    llmq.RuntimeEnv.reset()
    return out.read_text().splitlines(), done_seconds, queue.records() if queue else records_of(ledger.attempts)


# %% [markdown]
# ## Flag off
#
# As before llmq: a few services at a time, and each service's calls one after the other.

# %%
off = llmq.Settings(concurrency=CONCURRENCY)
off_lines, off_seconds, off_records = await generate("off", off)
plot_gantt(off_records)

# %% [markdown]
# A row is a service, a bar is a call, its colour the kind of call. Each row has one bar at a time: the three mappings
# of a plateau stand in line behind each other, although none needs another.
#
# ## Flag on
#
# The same services and the same code; only the settings differ. Now the queue alone decides how many calls run.

# %%
on = llmq.Settings(concurrency=CONCURRENCY, llm_queue_enabled=True, llm_queue_concurrency=LLM_QUEUE_CONCURRENCY)
on_lines, on_seconds, on_records = await generate("on", on)
plot_gantt(on_records)

# %% [markdown]
# The bars of a row overlap now: all five plateaus go at once, a mapping starts as soon as its own features are there,
# and while the slow `features` of plateau 3 are under way other calls use the slots. Thin lines are waits for a slot.
# Older services go first, so the first results are there early, and not all of them at the end.

# %%
plot_timeline(on_records, limit=LLM_QUEUE_CONCURRENCY)

# %% [markdown]
# The slots are full from the beginning nearly to the end. A limit that is not reached would say: more services open at
# once (`concurrency`) could be worked on.
#
# ## Is it the queue, or just more calls at once?
#
# Both. To be fair to the old way, give it as many services at once as the queue has slots:

# %%
wide = llmq.Settings(concurrency=LLM_QUEUE_CONCURRENCY)
wide_lines, wide_seconds, wide_records = await generate("wide", wide)

runs = {
    f"off, {CONCURRENCY} services at once": off_seconds,
    f"off, {LLM_QUEUE_CONCURRENCY} services at once": wide_seconds,
    f"on, {LLM_QUEUE_CONCURRENCY} calls at once": on_seconds,
}
found = pd.DataFrame(
    {name: (done[0], sum(done) / len(done), done[-1]) for name, done in runs.items()},
    index=["first service", "mean", "last service"],
).T
found.round(1)

# %% [markdown]
# Seconds until a service was done. With as many services at once the old way is as fast in the end, but you wait long
# for the first one: nothing is finished until nearly everything is. And nothing bounds its calls together: add a
# second module with a semaphore of its own, and the provider sees the sum.
#
# ## The same results
#
# What the flag changes is when things happen, never what comes out.

# %%
print(len(on_lines), "records;", "equal with the flag off and on:", sorted(on_lines) == sorted(off_lines))

# %% [markdown]
# ## What this notebook claims, checked

# %%
assert sorted(on_lines) == sorted(off_lines) == sorted(wide_lines)
assert len(on_records.attempts) == len(off_records.attempts) == 21 * SERVICES
assert on_seconds[-1] < 0.5 * off_seconds[-1], "the run is over sooner"
assert on_seconds[0] < 0.5 * off_seconds[0], "and the first service is there sooner"
assert on_seconds[0] < 0.5 * wide_seconds[0], "also for as many calls at once"

# %%
ends = {(a.service_id, a.stage): a.ended_at for a in on_records.attempts}
starts = {(a.service_id, a.stage): a.started_at for a in on_records.attempts}
for service, stage in starts:
    if stage.startswith("mapping_"):
        features = f"features_{stage.split('_')[1]}"
        assert starts[service, stage] >= ends[service, features], "a mapping needs its features"

# %%
folder.cleanup()
