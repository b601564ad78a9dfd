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
# # Telemetry: DataFrame, Prometheus, Logfire
#
# Three ways to see what your calls did, from the nearest to the most public one:
#
# - **records**, one row a call, as a DataFrame: for questions that you have now, in this notebook;
# - **metrics**, counters that a Prometheus server collects every few seconds: for dashboards and alarms;
# - **traces**, one span a call inside your own spans, as Logfire shows them: for "why was *this* one slow?".
#
# None of them holds prompts, answers or keys. Nothing leaves this machine here, and no account is needed.

# %%
CALLS = 300
AT_ONCE = 12
REQUESTS_PER_MINUTE = 2400

# %% [markdown]
# Metrics are switched on once for the process, before there is a queue. Port 0 takes a free one; without an argument it
# is 9464, where the Prometheus of `config/prometheus` looks.

# %%
import llmq

port = llmq.serve_metrics(0)

# %% [markdown]
# ## Something to look at
#
# Two kinds of calls to a simulated provider in this process. `LLMTaskMeta` says what a call is: its stage, its model,
# for whom it is. `report_tokens` tells what it used; calls of a wrapped SDK client (`llmq.wrap`) need neither that nor
# the name of the model.

# %%
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider

provider = SimulatedProvider(
    ProviderSpec(
        latency_seconds=0.1, requests_per_minute=REQUESTS_PER_MINUTE, bucket_seconds=1, slow_stages={"draft": 3}
    )
)
queue = llmq.LLMQueue(AT_ONCE)


def meta(n):
    return llmq.LLMTaskMeta(stage="draft" if n % 4 == 0 else "outline", model_name="small", service_id=f"s-{n % 10}")


async def call(n):
    question = {"role": "user", "content": f"Article {n}"}
    answer = await provider.complete(ChatRequest(model="small", messages=[question], stage=meta(n).stage))
    llmq.report_tokens(answer.prompt_tokens, answer.completion_tokens)
    return answer


async def work_off(calls):
    async with queue.map(call, range(calls), meta=meta, retry=llmq.Retry(attempts=20)) as outcomes:
        async for outcome in outcomes:
            outcome.unwrap()


await work_off(CALLS)
queue

# %% [markdown]
# ## Records: a DataFrame
#
# An **operation** is what you submit, an **attempt** is one request to the provider. A call that was refused once and
# then succeeded is one operation with two attempts.

# %%
operations = queue.records().operations.to_pandas()
attempts = queue.records().attempts.to_pandas()
columns = ["stage", "service_id", "attempt", "outcome", "wait_seconds", "service_seconds", "output_tokens"]
attempts[columns].head().round(3)

# %%
bars = (
    attempts[attempts.outcome == "ok"]
    .groupby("stage")
    .service_seconds.plot.hist(bins=30, alpha=0.6, legend=True, title="seconds a call takes")
)
# %% [markdown]
# Percentiles belong to records, which have every call; histograms of metrics can only guess between two edges.

# %%
attempts.groupby("stage")[["wait_seconds", "service_seconds"]].quantile([0.5, 0.95]).unstack().round(3)

# %% [markdown]
# ## Metrics: what Prometheus would read
#
# Prometheus asks the process for a page of plain text. So can we:

# %%
from urllib.request import urlopen


def scraped():
    """The metrics of this process, as {name with labels: value}."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def total(name, *labels):
    """The sum over all series of this name with these labels."""
    found = scraped().items()
    return sum(value for key, value in found if key.startswith(name + "{") and all(label in key for label in labels))


for stage in ("outline", "draft"):
    completed = total("llm_queue_completed_total", f'stage="{stage}"')
    print(f"{stage}: {completed:.0f} completed")
print(f"429: {total('llm_queue_rate_limited_total'):.0f}")
print(f"tokens: {total('gen_ai_client_token_usage_sum'):.0f}")

# %% [markdown]
# The queries, rules and alarms for a dashboard are in `config/prometheus` and `config/grafana`; all names are in
# `docs/telemetry.md`. The share of refusals over the last minute, for instance, is
# `rate(llm_queue_rate_limited_total[1m])` over the rate of all attempts.
#
# ## Traces: Logfire
#
# With a token in `LOGFIRE_TOKEN`, `llmq.configure_logfire()` sends spans there. `send_to_logfire=False` sends nothing;
# here the spans are kept in memory to look at. (Metrics stay with Prometheus: OpenTelemetry keeps what was set up first
# and says so in its log, which is switched off for this cell. For both from the beginning there is
# `configure_logfire(metrics_port=9464)`.)

# %%
import logging

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans = InMemorySpanExporter()
logging.getLogger("opentelemetry.metrics").setLevel(logging.ERROR)
llmq.configure_logfire(
    send_to_logfire=False,
    metrics=False,
    inspect_arguments=False,
    additional_span_processors=[SimpleSpanProcessor(spans)],
)

# %%
import logfire

with logfire.span("tonight's articles"):
    await work_off(8)

# %%
finished = {span.context.span_id: span for span in spans.get_finished_spans()}


def depth(span):
    """How many spans are around it."""
    return 0 if span.parent is None else 1 + depth(finished[span.parent.span_id])


for span in sorted(finished.values(), key=lambda span: span.start_time)[:9]:
    milliseconds = (span.end_time - span.start_time) / 1e6
    print("    " * depth(span) + f"{span.name}  {milliseconds:.0f} ms  {span.attributes.get('stage', '')}")

# %% [markdown]
# Your own span is around the calls; inside each call are its wait, if it had to wait, and its requests to the provider.
#
# ## What this notebook claims, checked
#
# All three tell the same story, and it is the provider's own.

# %%
counted = provider.stats()
everything = queue.records()
refused = sum(attempt.outcome == "rejected" for attempt in everything.attempts)
assert len(operations) == CALLS
assert len(everything.operations) == total("llm_queue_completed_total") == CALLS + 8
assert len(everything.attempts) == counted["requests"]
assert refused == counted["refused"] == total("llm_queue_rate_limited_total") > 0

# %%
names = [span.name for span in finished.values()]
assert names.count("llm_queue.submit") == 8
assert names.count("chat small") >= 8
assert names.count("tonight's articles") == 1
assert all("Article" not in str(value) for span in finished.values() for value in span.attributes.values())

# %%
logfire.shutdown()
queue.close()
