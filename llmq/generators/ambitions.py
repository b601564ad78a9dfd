"""The ambitions generator: one call a service, for what it could aspire to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from llmq.generators.conversation import ConversationSession
from llmq.generators.plateaus import ServiceItem, Text, brief
from llmq.generators.services import Catalogues, Service
from llmq.pipeline import Pipeline, Stage
from llmq.providers.chat import ChatClient


class Ambition(BaseModel):
    """An aim, and how one would know that it was reached."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    description: Text
    measure: Text


class AmbitionsAnswer(BaseModel):
    """Answer of the `ambitions` call."""

    model_config = ConfigDict(extra="forbid")

    ambitions: Annotated[list[Ambition], Field(min_length=1, max_length=5)]


def ambitions_pipeline(client: ChatClient, catalogues: Catalogues) -> Pipeline:
    """The one stage, for items of `ServiceItem`. The catalogues are not needed."""

    async def ambitions(item: ServiceItem) -> AmbitionsAnswer:
        prompt = f"{brief(item.service)}\n\nName the ambitions that this service should have, each with a measure."
        return await ConversationSession(client, "ambitions", item.context).ask_async(prompt, AmbitionsAnswer)

    return Pipeline([Stage("ambitions", ambitions, gated=False)])


def ambitions_record(service: Service, results: dict[str, Any]) -> dict[str, Any]:
    """The output line of a service."""
    answer: AmbitionsAnswer = results["ambitions"]
    return {"service_id": service.service_id, "name": service.name, **answer.model_dump()}
