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
# # Compare two runs
#
# On Monday you measured. Today the provider feels slower; or you have changed a prompt, a model, a client, and want to
# know whether that was good. Two numbers always differ. The question is whether they differ by more than chance.
#
# This notebook measures a simulated provider on "Monday", again "today" after it has become slower, and once more
# when nothing has changed at all.

# %%
REQUESTS_PER_MINUTE = 600
SECONDS_MONDAY = 1.0
SECONDS_TODAY = 1.3

# %%
import tempfile
from pathlib import Path

import llmq
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider
from llmq.tune.compare import compare_sweeps

folder = tempfile.TemporaryDirectory()
LEVELS = [2, 4, 8, 16]


async def measured(name, seconds_per_call, seed):
    """A sweep, saved as `name`."""
    provider = SimulatedProvider(
        ProviderSpec(
            latency_seconds=seconds_per_call, requests_per_minute=REQUESTS_PER_MINUTE, bucket_seconds=1, seed=seed
        )
    )

    async def outline(topic):
        question = {"role": "user", "content": f"Outline an article on {topic}."}
        return await provider.complete(ChatRequest(model="m", messages=[question]))

    return await llmq.sweep(
        outline,
        ["tea", "rain", "salt", "wool"],
        LEVELS,
        virtual=True,
        calls=500,
        seed=seed,
        out=Path(folder.name) / name,
        on_progress=lambda progress: None,
    )


# %% [markdown]
# `out=` saves each point as it is measured, so that Monday's sweep is still there today.

# %%
monday = await measured("monday", SECONDS_MONDAY, seed=1)
today = await measured("today", SECONDS_TODAY, seed=2)
today.plot()

# %% [markdown]
# ## Better, worse, or undecided
#
# In a terminal it is `llmq compare out/monday out/today`.

# %%
comparison = compare_sweeps(Path(folder.name) / "monday", Path(folder.name) / "today")
print(comparison)

# %% [markdown]
# Each row is one figure before and after, with the interval of its change. *Better* or *worse* is said only where the
# interval leaves out "no change", and all intervals hold together: of a hundred pairs of equal runs, five at most have
# a row that cries wolf. The last line counts, goodput at the recommended setting.
#
# As a picture, hollow is before and filled is after:

# %%
comparison.plot("Monday and today")

# %% [markdown]
# Where few calls run at once, slower calls mean fewer of them. At the limit they do not: there the provider's rate
# binds, and a slower call costs slots and not goodput. So look at the operating points, too:

# %%
for name, sweep in {"Monday": monday, "today": today}.items():
    point = sweep.recommend()
    print(f"{name}: {point.level} at once, {point.requests_per_minute:.0f} requests a minute, {point.goodput:.2f}/s")

# %% [markdown]
# The answer to a slower provider is a larger number of calls at once, as long as the limit is the same.
#
# ## When nothing has changed
#
# The same provider as on Monday, with other random numbers. Nothing should be said to have changed, and nothing is:

# %%
again = await measured("again", SECONDS_MONDAY, seed=3)
unchanged = compare_sweeps(monday, again)
unchanged.plot("Monday, and the same again")

# %%
print(unchanged.verdict.capitalize() + ":", unchanged.reason)

# %% [markdown]
# ## What this notebook claims, checked

# %%
rows = {row.what: row for row in comparison.rows}
for level in (2, 4):
    row = rows[f"at {level}: goodput"]
    assert row.verdict == "worse", row
    assert row.low <= SECONDS_MONDAY / SECONDS_TODAY - 1 <= row.high, row
assert rows["at 4: service p95"].verdict == "worse"
assert today.recommend().level > monday.recommend().level

# %%
assert all(row.verdict == "undecided" for row in unchanged.rows if "goodput" in row.what and "/min" not in row.what)

# %%
folder.cleanup()
