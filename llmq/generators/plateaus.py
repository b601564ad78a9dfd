"""The plateau generator: what a service offers at five levels of maturity, and what each feature rests on.

Per service one `descriptions` call; per plateau one `features_<n>` call, then a `mapping_<n>_<set>` call for each
catalogue: 1 + 5 + 15 = 21 calls. A mapping needs the features of its own plateau and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaValidator, core_schema

from llmq.generators.conversation import ConversationSession, SessionContext
from llmq.generators.services import CatalogueItem, Catalogues, Service
from llmq.pipeline import Pipeline, Stage
from llmq.providers.chat import ChatClient

PLATEAUS: dict[str, str] = {
    "Foundational": "the basics are dependable: predictable, secure by default, and open about how it performs",
    "Enhanced": "problems are foreseen and often mended before a user notices them",
    "Autonomous": "the core process runs from end to end with hardly any human hand in it",
    "Outcome-Driven": "what is promised, measured and paid for is the outcome, not the activity",
    "Transformative": "it changes how its whole field works, and others build on it",
}
CALLS_PER_SERVICE = 1 + len(PLATEAUS) * 4

Text = Annotated[str, Field(min_length=1)]
V = TypeVar("V")

_title_of = GenerateJsonSchema().get_title_from_name


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FeatureDraft(_Answer):
    """A feature as the model writes it."""

    name: Text
    description: Text


class FeaturesAnswer(_Answer):
    """Answer of a `features` call."""

    features: Annotated[list[FeatureDraft], Field(min_length=1, max_length=5)]


@dataclass(frozen=True)
class Feature:
    """A feature with the id given to it here."""

    feature_id: str
    name: str
    description: str


@dataclass(frozen=True)
class ServiceItem:
    """A service on its way through a pipeline."""

    service: Service
    context: SessionContext


def plateau_pipeline(client: ChatClient, catalogues: Catalogues) -> Pipeline:
    """The 21 stages, for items of `ServiceItem`."""
    stages = [Stage("descriptions", _Descriptions(client), gated=False)]
    for number, plateau in enumerate(PLATEAUS, start=1):
        features = Stage(f"features_{number}", _Features(client, number, plateau), ("descriptions",), gated=False)
        stages.append(features)
        for name, catalogue in catalogues.items():
            label = f"mapping_{number}_{name}"
            stages.append(Stage(label, _Mapping(client, label, name, catalogue), (features.name,), gated=False))
    return Pipeline(stages)


def plateau_record(service: Service, results: dict[str, Any]) -> dict[str, Any]:
    """The output line of a service, from the results of its stages."""
    plateaus = []
    for number, name in enumerate(PLATEAUS, start=1):
        mappings = {
            label.removeprefix(f"mapping_{number}_"): result
            for label, result in results.items()
            if label.startswith(f"mapping_{number}_")
        }
        features = [
            {
                "feature_id": feature.feature_id,
                "name": feature.name,
                "description": feature.description,
                "mappings": {set_name: ids[feature.feature_id] for set_name, ids in mappings.items()},
            }
            for feature in results[f"features_{number}"]
        ]
        plateaus.append({"name": name, "description": results["descriptions"][name], "features": features})
    return {"service_id": service.service_id, "name": service.name, "plateaus": plateaus}


def brief(service: Service) -> str:
    """What a prompt tells about a service. Holds its id, so that two services never share a request."""
    lines = [f"Service {service.service_id}: {service.name}", service.description]
    lines += [f"Feature today: {feature.name}. {feature.description}" for feature in service.features]
    lines += [f"Job to be done: {job.name}. {job.explanation}" for job in service.jobs_to_be_done]
    return "\n".join(line for line in lines if line)


class _Descriptions:
    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self._answer = _ObjectOf("DescriptionsAnswer", list(PLATEAUS), _Values[str](Text))

    async def __call__(self, item: ServiceItem) -> dict[str, str]:
        plateaus = "\n".join(f"- {name}: {meaning}" for name, meaning in PLATEAUS.items())
        prompt = (
            f"{brief(item.service)}\n\nDescribe in one paragraph each what this service is like at these plateaus:\n"
            f"{plateaus}"
        )
        session = ConversationSession(self._client, "descriptions", item.context)
        return await session.ask_async(prompt, self._answer)


class _Features:
    def __init__(self, client: ChatClient, number: int, plateau: str) -> None:
        self._client = client
        self._number = number
        self._plateau = plateau

    async def __call__(self, item: ServiceItem, descriptions: dict[str, str]) -> list[Feature]:
        prompt = (
            f"{brief(item.service)}\n\nPlateau {self._plateau}: {descriptions[self._plateau]}\n\n"
            "Name the features that the service has at this plateau, with a sentence each."
        )
        session = ConversationSession(self._client, f"features_{self._number}", item.context)
        answer = await session.ask_async(prompt, FeaturesAnswer)
        return [
            Feature(f"{item.service.service_id}-P{self._number}-F{position}", draft.name, draft.description)
            for position, draft in enumerate(answer.features, start=1)
        ]


class _Mapping:
    def __init__(self, client: ChatClient, label: str, name: str, catalogue: Sequence[CatalogueItem]) -> None:
        self._client = client
        self._label = label
        self._name = name
        self._catalogue = catalogue
        entry: Any = Literal[tuple(item.id for item in catalogue)]
        self._ids = _Values[list[str]](Annotated[list[entry], Field(min_length=1, max_length=5)])

    async def __call__(self, item: ServiceItem, features: list[Feature]) -> dict[str, list[str]]:
        catalogue = "\n".join(f"- {entry.id}: {entry.name}. {entry.description}" for entry in self._catalogue)
        wanted = "\n".join(f"- {feature.feature_id}: {feature.name}. {feature.description}" for feature in features)
        prompt = (
            f"Catalogue of {self._name}:\n{catalogue}\n\nFeatures:\n{wanted}\n\n"
            "For each feature, give the ids of the catalogue entries that it rests on."
        )
        answer = _ObjectOf("MappingAnswer", [feature.feature_id for feature in features], self._ids)
        found = await ConversationSession(self._client, self._label, item.context).ask_async(prompt, answer)
        return {feature_id: list(dict.fromkeys(ids)) for feature_id, ids in found.items()}


class _Values(Generic[V]):
    """A type of values, as pydantic validates it and as a JSON schema says it."""

    def __init__(self, annotation: Any) -> None:
        adapter: TypeAdapter[V] = TypeAdapter(annotation)
        self.core_schema = adapter.core_schema
        self.json_schema = adapter.json_schema()


class _ObjectOf(Generic[V]):
    """An answer with exactly these keys, whatever characters they have, all required and of one type.

    Not a pydantic model: each mapping has keys of its own, and a model takes a millisecond to make and much garbage.
    """

    def __init__(self, title: str, keys: Sequence[str], values: _Values[V]) -> None:
        self._title = title
        self._keys = list(keys)
        self._values = values

    def model_json_schema(self) -> dict[str, Any]:
        """As of a pydantic model, to the letter: answers are cached by it."""
        return {
            "title": self._title,
            "type": "object",
            "properties": {key: self._values.json_schema | {"title": _title_of(key)} for key in self._keys},
            "required": self._keys,
            "additionalProperties": False,
        }

    def model_validate_json(self, json_data: str, /) -> dict[str, V]:
        """As of a pydantic model."""
        fields = {key: core_schema.typed_dict_field(self._values.core_schema) for key in self._keys}
        validator = SchemaValidator(core_schema.typed_dict_schema(fields, extra_behavior="forbid"))
        return cast(dict[str, V], validator.validate_json(json_data))
