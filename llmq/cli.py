"""`llmq`: run a generator, tune its concurrency, serve the simulated provider, look at the settings.

Thin: each command reads settings, calls what a notebook would call, and prints. Exit codes: 0 done; 1 done, with
services quarantined or left, or no recommendation; 2 refused; 130 interrupted, with all files valid.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError
from rich.console import Console

from llmq.doctor import examine, narrower_than_off
from llmq.errors import ConfigError, LLMQError
from llmq.generators.plateaus import CALLS_PER_SERVICE, ServiceItem, plateau_pipeline
from llmq.generators.run import RunReport, run_services
from llmq.generators.services import Service, read_catalogues, read_services, repeated, sample_services
from llmq.progress import Bar, Progress
from llmq.providers.chat import ChatClient
from llmq.providers.open import open_client
from llmq.providers.spec import ProviderSpec
from llmq.runtime import RuntimeEnv
from llmq.settings import DEFAULT_CONFIG_FILE, Settings, parse_assignments
from llmq.tune.recorder import RunRecorder
from llmq.virtual import VirtualLoop

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
    out: Annotated[Path, typer.Option(help="Folder for points, table, pictures, report and recommendation.")] = Path(
        "out/tune"
    ),
    config: Config = None,
    base_url: BaseUrl = None,
    model: Model = None,
    levels: Annotated[str, typer.Option(help="Calls at once, to measure.")] = "1 2 4 8 16 32 64",
    seconds: Annotated[
        float | None, typer.Option(help="Measure each level so long; default: 40 service times, 2 to 20 s.")
    ] = None,
    calls: Annotated[int | None, typer.Option(min=1, help="At least so many calls a level.")] = None,
    arrivals: Annotated[
        float | None, typer.Option(help="Open loop: so many calls a second arrive at random; with --single-calls.")
    ] = None,
    services: Annotated[Path | None, typer.Option(help="Services (JSONL); default: the samples.")] = None,
    catalogues: Catalogues = None,
    single_calls: Annotated[
        bool, typer.Option("--single-calls", help="One call a service, and not the plateau pipeline.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="The simulated provider in this process, and not over HTTP.")
    ] = False,
    virtual: Annotated[
        bool, typer.Option("--virtual", help="The simulated provider on a virtual clock: hours in seconds.")
    ] = False,
    simulate: Simulate = None,
    max_429_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of refusals that is allowed.")] = 0.01,
    slo_p95: Annotated[float | None, typer.Option(help="Bound on the 95th percentile of the service time, s.")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Stop at so many attempts.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop at so many tokens.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop at so many USD; needs llm_prices.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a paid provider is measured.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Put the answer into the settings file.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hold the answer, and check it: the checklist.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the points in the folder.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure several concurrency levels and recommend an operating point: a level, and a pace where a rate binds.

    Example: `llmq tune --out out/tune --simulate requests_per_minute=300 --seconds 5`
    """
    with _told():
        settings = _settings(config, base_url, model, simulate, catalogues, in_process=in_process or virtual)
        if virtual and settings.provider != "simulated":
            raise ConfigError("--virtual is for the simulated provider: a real one cannot be hurried")
        settings_file = _settings_file(config) if apply else None
        RuntimeEnv.reset()
        RuntimeEnv.initialize(settings)
        wanted = _levels(levels)
        items = read_services(services) if services else sample_services()
        target = "single calls" if single_calls else "plateau pipeline"
        read_catalogues(settings.catalogues_dir)
        from llmq.tune.dry_run import guess
        from llmq.tune.guard import Caps, Stopped
        from llmq.tune.sweep import VIRTUAL_CALLS, Sweep, sweep

        caps = Caps(max_calls, max_tokens, max_cost, max_minutes)
        if max_cost is not None and not settings.prices:
            raise ConfigError("--max-cost needs the model's price; set llm_prices")
        if dry_run:
            usual = f"{VIRTUAL_CALLS} calls" if virtual else "the usual time"
            each = _window(seconds, calls) or usual
            what = f"{target}, {len(items)} services over and over"
            how = f"at most {', '.join(map(str, wanted))} at once, each for {each}, and some between"
            _say_plan(settings, what, how)
            typer.echo(guess(wanted, seconds, calls, virtual=virtual, arrivals=arrivals, caps=caps))
            return
        from llmq.tune.verify import Verification
        from llmq.tune.verify import verify as hold

        paid = settings.provider != "simulated" and not _is_loopback(settings.base_url)
        at_terminal = err_console.is_terminal and sys.stdin.isatty()
        if paid and not yes and caps == Caps() and not at_terminal:
            raise ConfigError("a paid provider is measured with a cap (--max-calls, --max-cost ...) or with --yes")

        async def tuned() -> tuple[Sweep, Verification | str | None]:
            async with _tuned_client(settings, in_process or virtual) as (client, where):
                pipeline = _pipeline(client, settings, single_calls)
                found = await sweep(
                    _one_call(pipeline) if arrivals is not None and single_calls else pipeline,
                    _items(items, settings),
                    wanted,
                    virtual=virtual,
                    seconds=seconds,
                    calls=calls,
                    arrivals=arrivals,
                    slo_p95=slo_p95,
                    max_429_ratio=max_429_ratio,
                    caps=caps,
                    on_plan=_asks if paid and at_terminal and not yes else _tells,
                    out=out,
                    resume=resume,
                    title=f"{target} against {where}",
                )
                _show_sweep(found, out)  # whatever becomes of its verification
                setting = found.recommend().setting
                if not verify or setting is None:
                    return found, None
                if found.left is None:
                    return found, "the caps leave nothing for it"
                try:
                    return found, await hold(
                        pipeline,
                        _items(items, settings),
                        setting,
                        seconds=seconds,
                        bounds=found.bounds,
                        caps=found.left,
                    )
                except Stopped as error:
                    return found, str(error)

        swept, held = _run(tuned, f"the levels measured so far are in {out}; go on with --resume", virtual=virtual)
        failed = swept.recommend().level is None
        if isinstance(held, str):
            typer.echo(f"\nNot verified: {held}")
        elif held is not None:
            with _writing(out):
                (out / "verification.txt").write_text(f"{held}\n", encoding="utf-8")
            typer.echo(f"\n{held}")
        unproven = held is not None and (isinstance(held, str) or not held.passed)
        if settings_file is not None and unproven:
            typer.echo(f"Not applied to {settings_file}: its verification did not pass")
        elif settings_file is not None and not failed:
            changed = swept.apply(settings_file)
            said = ", ".join(f"{name}: {str(value).lower()}" for name, value in changed.items()) or "nothing to change"
            typer.echo(f"Applied to {settings_file}: {said}")
        if failed or unproven:
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
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Record the run for `llmq what-if`: times, outcomes, tokens and limits of the newest attempts; stage "
            "and model names, but no prompts, answers, keys or names of services."
        ),
    ] = None,
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
        recorder = None if trace is None else RunRecorder(trace, settings, out)
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
                        ledger=None if recorder is None else recorder.ledger,
                    )

        with _recorded(recorder):
            report = _run(generate, f"what is finished is in {out}; go on with --resume")
        typer.echo(str(report))
        if report.quarantined or report.halted:
            raise typer.Exit(1)


@contextmanager
def _recorded(recorder: RunRecorder | None) -> Iterator[None]:
    """The trace is written however the run ends; that it cannot be does not hide how it ended."""
    try:
        yield
    except BaseException:
        try:
            _write_trace(recorder)
        except LLMQError as error:
            err_console.print(f"Warning: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        raise
    _write_trace(recorder)


def _write_trace(recorder: RunRecorder | None) -> None:
    if recorder is not None:
        recorder.write()


@app.command("what-if")
def what_if(
    trace: Annotated[Path, typer.Argument(help="A recorded run: of `llmq run --trace`, or `write_trace()`.")],
    config: Config = None,
    levels: Annotated[str, typer.Option(help="Calls at once, to simulate.")] = "1 2 4 8 16 32 64",
    requests_per_minute: Annotated[float | None, typer.Option(help="Under this limit, and not the one met.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Under this limit, and not the one met.")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Under this limit on calls at once, and not the one met.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table, picture, report and recommendation.")] = None,
) -> None:
    """Say from a recorded run what other levels or limits would bring: simulated, nothing is called.

    The error against the recording is stated. What the recording says nothing of is told as unknown.

    Example: `llmq what-if run.trace --levels "4 8 16" --requests-per-minute 600`
    """
    with _told():
        from llmq.tune.whatif import run_what_if

        RuntimeEnv.reset()
        RuntimeEnv.initialize(Settings(config))
        try:
            found = run_what_if(
                trace,
                _levels(levels),
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                max_concurrency=max_concurrency,
            )
        except KeyboardInterrupt:
            err_console.print("\nInterrupted; nothing was written.")
            raise typer.Exit(130) from None
        answer = found.recommend()
        typer.echo(str(found))
        typer.echo(str(answer))
        if out is not None:
            _make_folder(out)
            _write_results(found, out)
            typer.echo(f"Report: {out / 'report.html'}   picture: {out / 'sweep.png'}")
        if answer.level is None:
            raise typer.Exit(1)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from None


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A sweep's folder, or saved benchmarks (JSON file or folder).")],
    after: Annotated[Path, typer.Argument(help="The other one, of the same kind.")],
) -> None:
    """Say of two sweeps, or of the benchmarks of two commits, what is better, worse or undecided, with intervals.

    Example: `llmq compare out/tune-monday out/tune-today`. Exit code 1: worse.
    """
    with _told():
        from llmq.tune.compare import compare_benchmarks, compare_sweeps

        of_sweeps = _is_sweep(before)
        if of_sweeps != _is_sweep(after):
            raise ConfigError(f"{before} and {after} are not of one kind: compare two sweeps, or two benchmark runs")
        found = compare_sweeps(before, after) if of_sweeps else compare_benchmarks(before, after)
        typer.echo(str(found))
        if found.verdict == "worse":
            raise typer.Exit(1)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A sweep's folder, or saved benchmarks (JSON file or folder).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; default: where the data is.")] = None,
) -> None:
    """Draw what was saved: a sweep's table, picture and HTML report, or a picture of benchmarks.

    Example: `llmq report out/tune`
    """
    with _told():
        folder = out or (path if path.is_dir() else path.parent)
        if _is_sweep(path):
            from llmq.tune.sweep import Sweep

            found = Sweep.read(path)
            typer.echo(str(found))
            typer.echo(str(found.recommend()))
            _write_results(found, folder)
            typer.echo(f"Report: {folder / 'report.html'}   picture: {folder / 'sweep.png'}")
            return
        from llmq.tune.benchmarks import benchmarks_table, plot_benchmarks

        typer.echo(benchmarks_table(path))
        with _writing(folder):
            plot_benchmarks(path).savefig(folder / "benchmarks.png", dpi=150)
        typer.echo(f"Picture: {folder / 'benchmarks.png'}")


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


def _run(main: Callable[[], Coroutine[Any, Any, T]], on_interrupt: str, *, virtual: bool = False) -> T:
    try:
        with asyncio.Runner(loop_factory=VirtualLoop if virtual else None) as runner:
            return runner.run(main())
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


def _window(seconds: float | None, calls: int | None) -> str:
    parts = [f"{seconds:g} s"] if seconds is not None else []
    return " and ".join([*parts, *([f"{calls} calls"] if calls is not None else [])])


def _asks(prediction: Any) -> bool:
    """The cost guard, at a terminal."""
    return typer.confirm(f"This will use {prediction}. Go on?", err=True)


def _tells(prediction: Any) -> bool:
    err_console.print(f"This will use {prediction}.", highlight=False)
    return True


def _is_loopback(base_url: str | None) -> bool:
    return base_url is not None and urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def _settings_file(config: Path | None) -> Path:
    path = config or DEFAULT_CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"--apply changes a settings file, and {path} is not there; name one with --config")
    return path


def _one_call(pipeline: Any) -> Any:
    """A pipeline of one stage as a call."""
    (stage,) = pipeline.stages

    async def single_call(item: Any) -> object:
        return await stage.call(item)

    return single_call


def _is_sweep(path: Path) -> bool:
    """Whether it is a sweep, and not saved benchmarks. Raises `ConfigError` for what can be neither."""
    if not path.exists():
        raise ConfigError(f"there is nothing at {path}")
    folder = path.parent if path.name in ("points.jsonl", "sweep.json") else path
    if (folder / "points.jsonl").exists():
        return True
    if folder != path or (path / "sweep.json").exists():
        raise ConfigError(f"{folder} holds no points.jsonl, so there is no sweep")
    if (path / "recommendation.txt").exists():
        raise ConfigError(
            f"{path} holds what `llmq what-if` wrote, which is all there is of it: its points are not saved; see "
            f"{path / 'report.html'}, or simulate again"
        )
    return False


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from None


def _show_sweep(found: Any, out: Path) -> None:
    typer.echo(str(found))
    typer.echo(str(found.recommend()))
    _write_results(found, out)
    typer.echo(f"Report: {out / 'report.html'}   picture: {out / 'sweep.png'}   points: {out / 'points.csv'}")


def _write_results(found: Any, out: Path) -> None:
    from llmq.tune.page import write_html

    with _writing(out):
        (out / "table.txt").write_text(str(found), encoding="utf-8")
        (out / "recommendation.txt").write_text(f"{found.recommend()}\n", encoding="utf-8")
        found.plot().savefig(out / "sweep.png", dpi=150)
        write_html(found, out / "report.html")


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
def _run_progress(total: int) -> Iterator[Callable[[RunReport], None]]:
    bar = Bar("services", total)
    with Progress([bar]) as shown:

        def show(report: RunReport) -> None:
            bar.done, bar.failed = report.finished + report.skipped, report.quarantined
            bar.mark()
            shown.changed()

        yield show
