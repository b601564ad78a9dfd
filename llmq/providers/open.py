"""From settings to a client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llmq.errors import ConfigError
from llmq.providers.chat import ChatClient
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec


@asynccontextmanager
async def open_client(
    provider: str, *, base_url: str | None, api_key_env: str, simulate: ProviderSpec
) -> AsyncIterator[ChatClient]:
    """The client for a provider, closed at the end. Raises `ConfigError` for a missing key or extra."""
    if provider == "simulated":
        yield SimulatedProvider(simulate)
        return
    try:
        from llmq.providers.openai_client import OpenAICompatibleClient
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'llmq-toolkit[openai]'") from None
    client = OpenAICompatibleClient(base_url, api_key_env=api_key_env)
    try:
        yield client
    finally:
        await client.aclose()
