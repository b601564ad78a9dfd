"""What tests and notebooks of llmq's users need: virtual time, and a provider that costs nothing.

provider = serve_provider(requests_per_minute=300)      # over HTTP; provider.url, provider.stats(), provider.stop()
provider = SimulatedProvider(ProviderSpec(...))         # in this process; await provider.complete(...)
with asyncio.Runner(loop_factory=VirtualLoop) as runner: ...
await in_virtual_time(main)                             # the same in a notebook
"""

from typing import TYPE_CHECKING, Any

from llmq.errors import VirtualTimeError
from llmq.providers.chat import ChatAnswer, ChatRequest
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.virtual import VirtualDeadlock, VirtualLoop, in_virtual_time

if TYPE_CHECKING:
    from llmq.providers.server import ServedProvider

__all__ = [
    "ChatAnswer",
    "ChatRequest",
    "ProviderSpec",
    "SimulatedProvider",
    "VirtualDeadlock",
    "VirtualLoop",
    "VirtualTimeError",
    "in_virtual_time",
    "serve_provider",
]


def serve_provider(**spec: Any) -> "ServedProvider":
    """Start an OpenAI-compatible HTTP server on loopback, in a process of its own. `spec`: see `ProviderSpec`.

    Also a context manager. Needs the extra `server`.
    """
    from llmq.providers.server import ServedProvider

    return ServedProvider(ProviderSpec(**spec))
