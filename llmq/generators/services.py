"""What the generators read: services, and the catalogues that features are mapped to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmq.errors import InputError
from llmq.generators.jsonl import read_models

MappingSet = Literal["applications", "technologies", "data"]
CATALOGUE_FILES: dict[MappingSet, str] = {
    "applications": "applications.json",
    "technologies": "technologies.json",
    "data": "information.json",
}


class _Input(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Job(_Input):
    """A job to be done."""

    name: str
    explanation: str = ""


class ExistingFeature(_Input):
    """A feature that a service has today."""

    name: str
    description: str = ""


class Service(_Input):
    """A line of the services file. Further fields are allowed and not used."""

    service_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    description: str = ""
    features: tuple[ExistingFeature, ...] = ()
    jobs_to_be_done: tuple[Job, ...] = ()


class CatalogueItem(_Input):
    """Something that a feature can be mapped to."""

    id: str = Field(min_length=1)
    name: str
    description: str = ""


class _CatalogueFile(_Input):
    items: tuple[CatalogueItem, ...] = Field(min_length=1)


Catalogues = dict[MappingSet, tuple[CatalogueItem, ...]]


def read_services(path: Path) -> list[Service]:
    """All services of a JSONL file. Raises `InputError` for a bad line or an id that is there twice."""
    services = list(read_models(path, Service, "service_id"))
    if not services:
        raise InputError(f"{path} has no service")
    return services


def read_catalogues(folder: Path | None = None) -> Catalogues:
    """The three catalogues of a folder; by default the samples of this package. Raises `InputError`."""
    if folder is None:
        with as_file(files("llmq.generators") / "samples") as samples:
            return read_catalogues(samples)
    return {name: _read_catalogue(folder / file) for name, file in CATALOGUE_FILES.items()}


def sample_services() -> list[Service]:
    """The sample services of this package."""
    with as_file(files("llmq.generators") / "samples" / "services.jsonl") as path:
        return read_services(path)


def repeated(services: list[Service], times: int | None = None) -> Iterator[Service]:
    """The services over and over, under fresh ids from the second time on; for ever where `times` is None."""
    yield from services
    turn = 2
    while times is None or turn <= times:
        for service in services:
            yield service.model_copy(update={"service_id": f"{service.service_id}-{turn}"})
        turn += 1


def _read_catalogue(path: Path) -> tuple[CatalogueItem, ...]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = _CatalogueFile.model_validate({"items": content} if isinstance(content, list) else content)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if len({item.id for item in found.items}) != len(found.items):
        raise InputError(f"{path}: an id is there twice")
    return found.items
