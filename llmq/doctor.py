"""What `llmq doctor` says: the settings in force and their sources, what is installed, what looks wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmq.settings import ENV_PREFIX, Settings, nearest

_EXTRAS = {
    "openai": ("openai", "aiohttp"),
    "server": ("starlette", "uvicorn"),
    "otel": ("opentelemetry-sdk",),
    "prometheus": ("opentelemetry-exporter-prometheus", "prometheus-client"),
    "logfire": ("logfire",),
    "tune": ("matplotlib", "pandas"),
    "notebook": ("ipykernel",),
}


def examine(settings: Settings) -> Group:
    """Everything, to be printed."""
    flag = "on" if settings.llm_queue_enabled else "off"
    parts: list[RenderableType] = [
        Text(f"Python {sys.version.split()[0]}, llmq-toolkit {_version('llmq-toolkit') or 'not installed'}"),
        Text(f"LLM queue: {flag} ({settings.source_of('llm_queue_enabled')})", style="bold"),
        _settings_table(settings),
        _extras_table(),
    ]
    complaints = list(complain(settings))
    parts += [Text(f"! {complaint}", style="yellow") for complaint in complaints]
    if not complaints:
        parts.append(Text("Nothing looks wrong.", style="green"))
    return Group(*parts)


def complain(settings: Settings) -> Iterator[str]:
    """What is allowed and yet unlikely to be meant, a line each."""
    narrowed = narrower_than_off(settings)
    if narrowed is not None:
        yield narrowed
    if settings.base_url is not None and settings.provider == "simulated":
        yield f"base_url is {settings.base_url}, but provider is simulated, which does not use it; set provider: openai"
    if settings.provider == "openai":
        if not os.environ.get(settings.api_key_env):
            yield f"the environment variable {settings.api_key_env} is not set; only a loopback endpoint needs no key"
        if _version("openai") is None:
            yield "provider is openai, and the SDK is not installed: pip install 'llmq-toolkit[openai]'"
    if settings.llm_queue_limits and not settings.llm_queue_enabled:
        yield "llm_queue_limits are set, and llm_queue_enabled is false: none of them holds"
    for pace in ("llm_queue_requests_per_minute", "llm_queue_tokens_per_minute"):
        if getattr(settings, pace) is not None and not settings.llm_queue_enabled:
            yield f"{pace} is set, and llm_queue_enabled is false: nothing is paced"
    if settings.retry_attempts == 1:
        yield "retry_attempts is 1: a single refusal ends a call"
    if settings.request_timeout is None:
        yield "request_timeout is null: a call that hangs holds its slot for ever"
    if settings.transcripts_dir is not None:
        yield f"transcripts_dir is set: prompts and answers are written to {settings.transcripts_dir}"
    known = {f"{ENV_PREFIX}{name.upper()}" for name in type(settings).model_fields}
    for variable in sorted(os.environ):
        if variable.startswith(ENV_PREFIX) and variable not in known:
            yield f"{variable} is in the environment and is no setting of llmq{nearest(variable, known)}"


def narrower_than_off(settings: Settings) -> str | None:
    """The warning for a queue that allows fewer calls at once than no queue would, with both figures."""
    if not settings.llm_queue_enabled or settings.llm_queue_concurrency >= settings.concurrency:
        return None
    return (
        f"llm_queue_concurrency is {settings.llm_queue_concurrency}; with the queue off {settings.concurrency} calls "
        "run at once (one for each open service), so the queue makes this slower. Measure with `llmq tune`"
    )


def _settings_table(settings: Settings) -> Table:
    table = Table(header_style="bold", title="Settings", title_justify="left")
    for name in ("setting", "value", "from"):
        table.add_column(name)
    for name in type(settings).model_fields:
        value, source = getattr(settings, name), settings.source_of(name)
        table.add_row(name, str(value), source, style=None if source == "default" else "bold")
    return table


def _extras_table() -> Table:
    table = Table(header_style="bold", title="Installed", title_justify="left")
    for name in ("extra", "packages"):
        table.add_column(name)
    for extra, packages in _EXTRAS.items():
        found = [f"{package} {_version(package) or 'missing'}" for package in packages]
        table.add_row(extra, ", ".join(found))
    return table


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
