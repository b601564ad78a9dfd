"""What the site has beside the pages of docs/, for mkdocs and for griffe, which reads the docstrings.

- A notebook is shown as it was executed, as a page with its pictures. Nothing is executed here.
- A link may leave docs/, as it must for readers on GitHub: to a notebook, the changelog, a file of the repository. The
  page or file is put into the site, under `repository/` if it is no page, and the link leads there.
- The reference of settings and commands is written from the code.
- Doctests in docstrings are shown as code, and not as quotations.
"""

import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)(?=[)#])")

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the notebooks in the navigation, where it says so."""
    for section in config.nav or ():
        if "Notebooks" in section:
            section["Notebooks"] = [*section["Notebooks"], *(_in_site(f"notebooks/{path.name}") for path in NOTEBOOKS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, and what is linked outside of docs/."""
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor(enabled=True)])
    for path in NOTEBOOKS:
        text, resources = exporter.from_filename(str(path), {"output_files_dir": f"{path.stem}_files"})
        files.append(File.generated(config, _in_site(f"notebooks/{path.name}"), content=text))
        for name, data in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    linked = {target for page in files.documentation_pages() for target in _links(page.src_uri, page.content_string)}
    for target in sorted(linked | {"CHANGELOG.md"}):
        if not target.startswith("docs/") and files.get_file_from_path(_in_site(target)) is None:
            files.append(File.generated(config, _in_site(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to where their targets are in the site, and write what the code tells."""
    if page.file.src_uri == "reference/settings.md":
        markdown += _settings()
    if page.file.src_uri == "reference/cli.md":
        markdown += _commands()
    here = page.file.src_uri

    def led(link: re.Match[str]) -> str:
        return posixpath.relpath(_in_site(_target(here, link[1])), posixpath.dirname(here) or ".")

    return LINK.sub(led, markdown)


def _links(src_uri: str, markdown: str) -> Iterator[str]:
    """What a page links to, as paths in the repository, if they are files there."""
    targets = (_target(src_uri, link) for link in LINK.findall(markdown))
    return (target for target in targets if (ROOT / target).is_file())


def _target(src_uri: str, link: str) -> str:
    """A link of a page, as a path in the repository."""
    source = src_uri if src_uri.startswith("notebooks/") or src_uri == "CHANGELOG.md" else f"docs/{src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(target: str) -> str:
    """Where a file of the repository is in the site."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.startswith("notebooks/"):
        return f"{target.removesuffix('.ipynb')}.md" if target.endswith(".ipynb") else target
    return target if target == "CHANGELOG.md" else f"repository/{target}"


def _commands() -> str:
    """Every command with its options, in typer's own words."""
    command = [sys.executable, "-m", "typer", "llmq.cli", "utils", "docs", "--name", "llmq"]
    plain = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    text = subprocess.run(command, cwd=ROOT, env=plain, check=True, capture_output=True, text=True).stdout
    return "\n" + re.sub(r"^#", "##", text.partition("\n")[2], flags=re.MULTILINE)


def _settings() -> str:
    from llmq.providers.spec import ProviderSpec
    from llmq.settings import ENV_PREFIX, Settings

    defaults = {name: field.get_default() for name, field in Settings.model_fields.items()}
    top = [
        f"| `{name}` | `{ENV_PREFIX}{name.upper()}` | {'see below' if name == 'simulate' else _value(defaults[name])} "
        f"| {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    spec = [
        f"| `{name}` | {_value(field.get_default(call_default_factory=True))} | {field.description} |"
        for name, field in ProviderSpec.model_fields.items()
    ]
    return "\n".join(
        [
            "\n## Every key\n",
            "| key | environment | default | |\n|---|---|---|---|",
            *top,
            "\n## What `simulate` holds\n",
            "| key | default | |\n|---|---|---|",
            *spec,
        ]
    )


def _value(default: object) -> str:
    if isinstance(default, BaseModel):
        default = default.model_dump()
    if isinstance(default, tuple):
        default = list(default)
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{shown}`"


class Doctests(griffe.Extension):
    """Doctests become code blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence what begins with `>>>`, up to the next empty line."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
