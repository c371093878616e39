"""One loopback Hub, and a client process for each kind of environment; repos are each test's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hub.client import Client
from hub.loopback import LoopbackHub

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    yield hub
    hub.stop()


@pytest.fixture
def hub(server: LoopbackHub) -> LoopbackHub:
    server.reset()
    return server


@pytest.fixture
def name() -> str:
    """A repo id that no other test has used, because the clients' caches last."""
    return f"user/model-{next(_numbers)}"


@pytest.fixture(scope="session")
def default_client(server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The default environment; it would send a file in LFS by Xet, so it needs a Hub with all files in the commits."""
    client = Client(server.url, tmp_path_factory.mktemp("default"))
    yield client
    client.close()


@pytest.fixture(scope="session")
def lfs_client(server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(server.url, tmp_path_factory.mktemp("lfs"), HF_HUB_DISABLE_XET="1")
    yield client
    client.close()


@pytest.fixture(params=["regular", "lfs"])
def client(request: pytest.FixtureRequest, hub: LoopbackHub) -> Client:
    """Both environments in turn, with the Hub set up for each."""
    if request.param == "lfs":
        hub.lfs_suffixes = (".safetensors",)
        return request.getfixturevalue("lfs_client")
    return request.getfixturevalue("default_client")
