"""Break the code on purpose, one defect at a time, and see that the tests notice.

Each `.patch` beside this file is a realistic defect. Its first lines name the tests that must catch it, as arguments
to pytest, and say what is broken. Every patch is applied to a fresh copy of the project in a temporary folder, and the
tests run there. One that they do not catch is a hole in the tests. Names of patches as arguments run only those.

A patch that no longer applies is to be made anew: break the code, `git diff -U1`, and put the two lines back on top.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
COPIED = ["llmq", "tests", "config", "pyproject.toml"]
PATIENCE_SECONDS = 120
"""Of one run of tests. A defect that makes them hang counts as caught."""

PASSED, FAILED = 0, 1
"""Of pytest's exit codes, those that say something about the code; any other says that the tests did not run."""


class Broken(Exception):
    """This mutant tells nothing: its patch does not apply, or its tests do not run, or fail without it."""


@dataclass(frozen=True)
class Mutant:
    """One defect."""

    name: str
    patch: str
    tests: str
    what: str


def read(path: Path) -> Mutant:
    """A patch, with what its first lines say."""
    patch = path.read_text()
    notes = dict(line[2:].split(": ", 1) for line in patch.partition("diff --git")[0].splitlines())
    return Mutant(path.stem, patch, notes["tests"], notes["what"])


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the project, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="llmq-mutant-") as folder:
        for name in COPIED:
            if (PROJECT / name).is_dir():
                shutil.copytree(PROJECT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(PROJECT / name, folder)
        yield Path(folder)


def run(folder: Path, *command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy, whose llmq goes before the installed one and which is in no repository."""
    environ = os.environ | {"PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(
        command, cwd=folder, env=environ, input=stdin, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def check_import(folder: Path) -> None:
    """Raise Broken unless it is the copy that is imported."""
    found = run(folder, sys.executable, "-c", "import llmq; print(llmq.__file__)").stdout.strip()
    if not found or not Path(found).resolve().is_relative_to(folder.resolve()):
        raise Broken(f"the tests would import {found or 'nothing'} instead of the copy in {folder}")


def failed_test(folder: Path, tests: str) -> str | None:
    """Run tests in a copy: the first that failed, or None."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *shlex.split(tests)]
    try:
        done = run(folder, sys.executable, "-m", "pytest", *options)
    except subprocess.TimeoutExpired:
        return f"a hang of {PATIENCE_SECONDS} s"
    if done.returncode not in (PASSED, FAILED):
        raise Broken(f"pytest {tests}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    if done.returncode == PASSED:
        return None
    lines = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return lines[0].split(" - ")[0] if lines else "an error outside of the tests"


def apply(folder: Path, mutant: Mutant) -> None:
    """Apply a patch to a copy, or raise Broken."""
    done = run(folder, "git", "apply", "-", stdin=mutant.patch)
    if done.returncode:
        raise Broken(f"the patch does not apply\n{done.stderr}")


def check_without(mutants: list[Mutant]) -> None:
    """Raise Broken unless the named tests pass as long as nothing is broken."""
    with copy() as folder:
        check_import(folder)
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            if failed := failed_test(folder, tests):
                raise Broken(f"{failed} fails without any patch")


def caught_by(mutant: Mutant) -> str | None:
    """The test that catches a defect, or None."""
    with copy() as folder:
        apply(folder, mutant)
        return failed_test(folder, mutant.tests)


def report(mutant: Mutant, width: int) -> bool:
    """Try one and print its line. Whether it was caught."""
    began = time.monotonic()
    try:
        caught = caught_by(mutant)
        verdict = caught or f"SURVIVED pytest {mutant.tests}: {mutant.what}"
    except Broken as error:
        caught, verdict = None, f"BROKEN {error}"
    print(f"{mutant.name:{width}}  {time.monotonic() - began:5.1f} s  {verdict}", flush=True)
    return caught is not None


def main(names: list[str]) -> int:
    """Try all, or those named. The number to exit with."""
    mutants = [read(path) for path in sorted(HERE.glob("*.patch")) if not names or path.stem in names]
    if not mutants:
        print(f"no such patch in {HERE}")
        return 1
    try:
        check_without(mutants)
    except Broken as error:
        print(error)
        return 1
    width = max(len(mutant.name) for mutant in mutants)
    caught = sum([report(mutant, width) for mutant in mutants])
    print(f"{caught} of {len(mutants)} caught")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main([name.removesuffix(".patch") for name in sys.argv[1:]]))
