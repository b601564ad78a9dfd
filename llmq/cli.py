"""`llmq`: run a generator, tune its concurrency, serve the simulated provider, look at the settings.

Thin: each command reads settings, calls what a notebook would call, and prints. Exit codes: 0 done; 1 done, with
services quarantined or left, or no recommendation; 2 refused; 130 interrupted, with all files valid.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llmq.doctor import examine, narrower_than_off
from llmq.errors import ConfigError, LLMQError
from llmq.generators.plateaus import CALLS_PER_SERVICE, ServiceItem, plateau_pipeline
from llmq.generators.run import RunReport, run_services
from llmq.generators.services import Service, read_catalogues, read_services, repeated, sample_services
from llmq.providers.chat import ChatClient
from llmq.providers.open import open_client
from llmq.providers.spec import ProviderSpec
from llmq.runtime import RuntimeEnv
from llmq.settings import Settings, parse_assignments

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="How many LLM calls should run at once? Measured, and kept in force.",
)
provider_app = typer.Typer(no_args_is_help=True, help="The simulated provider.")
app.add_typer(provider_app, name="provider")

out_console = Console()
err_console = Console(stderr=True)


class GeneratorChoice(StrEnum):
    """What `llmq run` generates."""

    plateaus = "plateaus"
    ambitions = "ambitions"


Config = Annotated[Path | None, typer.Option(help="Settings file; default: config/app.yaml if it is there.")]
BaseUrl = Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, with its /v1.")]
Model = Annotated[str | None, typer.Option(help="Model to ask for.")]
Simulate = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Behaviour of the simulated provider; see `llmq provider --help`."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be called, and call nothing.")]
Catalogues = Annotated[
    Path | None, typer.Option(help="Folder with applications.json, technologies.json, information.json.")
]


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="Folder for points, table, picture and recommendation.")] = Path("out/tune"),
    config: Config = None,
    base_url: BaseUrl = None,
    model: Model = None,
    levels: Annotated[str, typer.Option(help="Calls at once, to measure.")] = "1 2 4 8 16 32 64",
    seconds: Annotated[
        float | None, typer.Option(help="Measure each level so long; default: 40 service times, 2 to 20 s.")
    ] = None,
    services: Annotated[Path | None, typer.Option(help="Services (JSONL); default: the samples.")] = None,
    catalogues: Catalogues = None,
    single_calls: Annotated[
        bool, typer.Option("--single-calls", help="One call a service, and not the plateau pipeline.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="The simulated provider in this process, and not over HTTP.")
    ] = False,
    simulate: Simulate = None,
    max_429_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of refusals that is allowed.")] = 0.01,
    slo_p95: Annotated[float | None, typer.Option(help="Bound on the 95th percentile of the service time, s.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the points in the folder.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure several concurrency levels and recommend one.

    Example: `llmq tune --out out/tune --simulate requests_per_minute=300 --seconds 5`
    """
    with _told():
        settings = _settings(config, base_url, model, simulate, catalogues, in_process=in_process)
        RuntimeEnv.reset()
        RuntimeEnv.initialize(settings)
        wanted = _levels(levels)
        items = read_services(services) if services else sample_services()
        target = "single calls" if single_calls else "plateau pipeline"
        read_catalogues(settings.catalogues_dir)
        if dry_run:
            each = "the usual time" if seconds is None else f"{seconds:g} s"
            what = f"{target}, {len(items)} services over and over"
            _say_plan(
                settings, what, f"at most {', '.join(map(str, wanted))} at once, each for {each}, and some between"
            )
            return
        from llmq.tune.sweep import sweep

        async def measure() -> Any:
            async with _tuned_client(settings, in_process) as (client, where):
                pipeline = _pipeline(client, settings, single_calls)
                with _sweep_progress() as on_progress:
                    return await sweep(
                        pipeline,
                        _items(items, settings),
                        wanted,
                        seconds=seconds,
                        slo_p95=slo_p95,
                        max_429_ratio=max_429_ratio,
                        out=out,
                        resume=resume,
                        title=f"{target} against {where}",
                        on_progress=on_progress,
                    )

        found = _run(measure, f"the levels measured so far are in {out}; go on with --resume")
        answer = found.recommend()
        typer.echo(str(found))
        typer.echo(str(answer))
        try:
            (out / "table.txt").write_text(str(found), encoding="utf-8")
            (out / "recommendation.txt").write_text(f"{answer}\n", encoding="utf-8")
            found.plot().savefig(out / "sweep.png", dpi=150)
        except OSError as error:
            raise ConfigError(f"cannot write to {out}: {error.strerror or error}; the points are safe") from None
        typer.echo(f"Picture: {out / 'sweep.png'}   points: {out / 'points.csv'}")
        if answer.level is None:
            raise typer.Exit(1)


@app.command()
def run(
    services: Annotated[Path, typer.Option(help="Services, one JSON object a line.")],
    out: Annotated[Path, typer.Option(help="Records, one JSON object a line.")],
    config: Config = None,
    base_url: BaseUrl = None,
    model: Model = None,
    generator: Annotated[GeneratorChoice, typer.Option(help="What to generate.")] = GeneratorChoice.plateaus,
    catalogues: Catalogues = None,
    simulate: Simulate = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Generate a record for each service.

    Example: `llmq run --services config/services.jsonl --out out/plateaus.jsonl`
    """
    with _told():
        settings = _settings(config, base_url, model, simulate, catalogues)
        found = read_services(services)
        known = read_catalogues(settings.catalogues_dir)
        each = CALLS_PER_SERVICE if generator is GeneratorChoice.plateaus else 1
        if dry_run:
            if settings.llm_queue_enabled:
                how = f"through the queue, at most {settings.llm_queue_concurrency} at once"
            else:
                how = f"without the queue, {settings.concurrency} services at once"
            _say_plan(settings, f"{generator.value} of {len(found)} services: {len(found)} x {each} calls", how)
            return
        if out.exists() and out.samefile(services):
            raise ConfigError(f"--out and --services are the same file, {out}")
        RuntimeEnv.reset()
        RuntimeEnv.initialize(settings)
        warning = narrower_than_off(settings)
        if warning is not None:
            err_console.print(f"Warning: {warning}.", style="yellow")

        async def generate() -> RunReport:
            async with _client(settings) as client:
                with _run_progress(len(found)) as on_done:
                    return await run_services(
                        found,
                        out,
                        client=client,
                        catalogues=known,
                        settings=settings,
                        generator=generator.value,
                        resume=resume,
                        on_done=on_done,
                    )

        report = _run(generate, f"what is finished is in {out}; go on with --resume")
        typer.echo(str(report))
        if report.quarantined or report.halted:
            raise typer.Exit(1)


@app.command()
def doctor(config: Config = None) -> None:
    """Show the settings in force with their sources, the flag, what is installed and what looks wrong.

    Example: `SA_LLM_QUEUE_ENABLED=true llmq doctor`
    """
    with _told():
        out_console.print(examine(Settings(config)))


def _spec_help() -> str:
    defaults = ProviderSpec().model_dump()
    return "\n".join(
        f"- `{name}` ({defaults[name]!r}): {field.description}" for name, field in ProviderSpec.model_fields.items()
    )


@provider_app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8399,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    simulate: Simulate = None,
    spec_json: Annotated[str | None, typer.Option(hidden=True)] = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Serve the simulated provider over HTTP, OpenAI-compatible, until interrupted.

    Example: `llmq provider serve --port 8399 --simulate requests_per_minute=300`
    """
    with _told():
        spec = ProviderSpec.model_validate_json(spec_json) if spec_json else _spec(ProviderSpec(), simulate)
        try:
            from llmq.providers.server import serve as serve_forever
        except ImportError as error:
            raise ConfigError(f"{error.name} is not installed: pip install 'llmq-toolkit[server]'") from None
        try:
            serve_forever(spec, host, port, until_stdin_closes=until_stdin_closes)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


provider_app.info.help = (
    "The simulated provider: no key, no cost; everything random depends on (seed, request, attempt).\n\n"
    "Its behaviour is set by `--simulate NAME=VALUE`, as often as you like, or by the setting `simulate`:\n\n"
    f"{_spec_help()}\n\n"
    "Example: `llmq provider serve --port 8399 --simulate requests_per_minute=300 --simulate latency_seconds=1`"
)


@contextmanager
def _told() -> Iterator[None]:
    """What llmq refuses is told in a line, without a traceback."""
    try:
        yield
    except LLMQError as error:
        err_console.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _run(main: Callable[[], Coroutine[Any, Any, T]], on_interrupt: str) -> T:
    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        err_console.print(f"\nInterrupted; {on_interrupt}.", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _settings(
    config: Path | None,
    base_url: str | None,
    model: str | None,
    simulate: list[str] | None,
    catalogues: Path | None,
    *,
    in_process: bool = False,
) -> Settings:
    arguments: dict[str, Any] = {}
    if base_url is not None:
        if simulate or in_process:
            raise ConfigError("--base-url names a provider; --simulate and --in-process are for the simulated one")
        arguments |= {"base_url": base_url, "provider": "openai"}
    if model is not None:
        arguments["model"] = model
    if catalogues is not None:
        arguments["catalogues_dir"] = catalogues
    if simulate:
        arguments["simulate"] = _spec(Settings(config).simulate, simulate)
    return Settings(config, **arguments)


def _spec(base: ProviderSpec, assignments: list[str] | None) -> ProviderSpec:
    changes = parse_assignments(assignments or (), ProviderSpec)
    try:
        return ProviderSpec.model_validate({**base.model_dump(), **changes})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"--simulate {problems}") from None


def _levels(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--levels takes whole numbers, like '1 2 4 8'; got {text!r}") from None


def _say_plan(settings: Settings, what: str, how: str) -> None:
    where = (
        "the simulated provider: no key, no cost"
        if settings.provider == "simulated"
        else f"{settings.base_url or 'the OpenAI endpoint'}, key from {settings.api_key_env}"
    )
    typer.echo(f"Would run: {what}\nProvider: {where}, model {settings.model}\nCalls go {how}")


@asynccontextmanager
async def _client(settings: Settings) -> AsyncIterator[ChatClient]:
    opened = open_client(
        settings.provider,
        base_url=settings.base_url,
        api_key_env=settings.api_key_env,
        simulate=settings.simulate,
    )
    async with opened as client:
        yield client


@asynccontextmanager
async def _tuned_client(settings: Settings, in_process: bool) -> AsyncIterator[tuple[ChatClient, str]]:
    """A client, and what to call its provider. A simulated one is served over HTTP unless told otherwise."""
    if settings.provider == "simulated" and not in_process:
        with _served(settings.simulate) as server:
            served = settings.model_copy(update={"provider": "openai", "base_url": server.url})
            async with _client(served) as client:
                yield client, f"the simulated provider over HTTP{_changed(settings.simulate)}"
        return
    async with _client(settings) as client:
        if settings.provider == "simulated":
            yield client, f"the simulated provider{_changed(settings.simulate)}"
        else:
            yield client, f"{settings.base_url or 'the OpenAI endpoint'}, {settings.model}"


def _changed(spec: ProviderSpec) -> str:
    """What is not the default, in brackets."""
    changed = spec.model_dump(exclude_defaults=True)
    return f" ({', '.join(f'{name}={value}' for name, value in changed.items())})" if changed else ""


def _served(spec: ProviderSpec) -> Any:
    try:
        from llmq.providers.server import ServedProvider
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'llmq-toolkit[server]'") from None
    return ServedProvider(spec)


def _pipeline(client: ChatClient, settings: Settings, single_calls: bool) -> Any:
    known = read_catalogues(settings.catalogues_dir)
    if not single_calls:
        return plateau_pipeline(client, known)
    from llmq.generators.ambitions import ambitions_pipeline

    return ambitions_pipeline(client, known)


def _items(services: list[Service], settings: Settings) -> Iterator[ServiceItem]:
    from llmq.generators.conversation import SessionContext

    ranks = itertools.count()
    for service in repeated(services):
        yield ServiceItem(
            service,
            SessionContext(
                service.service_id,
                settings.model,
                rank=next(ranks),
                models=settings.stage_models,
                retry=settings.retry,
                request_timeout=settings.request_timeout,
            ),
        )


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not err_console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True) as bar:
        yield bar


@contextmanager
def _sweep_progress() -> Iterator[Callable[[Any], None]]:
    from llmq.tune.sweep import print_progress

    with _bar() as bar:
        if bar is None:
            yield print_progress
            return
        task = bar.add_task("warming up", total=None)

        def show(progress: Any) -> None:
            description = "done" if progress.level is None else f"measuring {progress.level} at once"
            bar.update(task, description=description, completed=progress.done, total=progress.total)
            if progress.point is not None:
                point = progress.point
                bar.console.print(
                    f"{point.level:>4} at once  {point.goodput:8.2f} ok/s  429 {point.share_429:6.1%}", highlight=False
                )

        yield show


@contextmanager
def _run_progress(total: int) -> Iterator[Callable[[RunReport], None]]:
    with _bar() as bar:
        if bar is None:
            yield lambda report: None
            return
        task = bar.add_task("services", total=total)

        def show(report: RunReport) -> None:
            done = report.finished + report.quarantined + report.skipped
            failed = f", {report.quarantined} failed" if report.quarantined else ""
            bar.update(task, completed=done, description=f"services{failed}")

        yield show
