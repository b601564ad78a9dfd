"""A real HTTP provider in a process of its own, for tests that talk to one."""

import json
import urllib.request
from contextlib import contextmanager

from llmq.providers.server import serving
from llmq.providers.spec import ProviderSpec


class Server:
    """Its base URL, and its own account of what it saw."""

    def __init__(self, url):
        self.url = url

    def stats(self, *, calls=False):
        root = self.url.removesuffix("/v1")
        with urllib.request.urlopen(f"{root}/stats?calls={'true' if calls else 'false'}", timeout=30) as answer:
            return json.load(answer)


@contextmanager
def server(**spec):
    with serving(ProviderSpec(**spec)) as url:
        yield Server(url)
