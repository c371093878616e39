"""Servers that are slow, or fall silent: waited for as long as they send, and not for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hub.calls import command, failed_pull, made, pull, push
from hub.client import Client, ClientError
from hub.loopback import LoopbackHub

WEIGHTS = r"GET /.*/resolve/\w+/model\.safetensors"


@pytest.fixture
def client(hub: LoopbackHub, default_client: Client) -> Client:
    return default_client


@contextmanager
def impatient(client: Client) -> Iterator[None]:
    """In here the client gives a silent server up after a second, not after 10 in a download and 60 elsewhere."""
    client.run("import tlstm.hub.download; from huggingface_hub import constants")
    code = "constants.HF_HUB_DOWNLOAD_TIMEOUT, tlstm.hub.download._PATIENCE = limits"
    client.run(code, limits=[1, 1])
    try:
        yield
    finally:
        client.run(code, limits=[10, 60])


def test_a_file_that_drips_arrives(hub: LoopbackHub, client: Client, name: str) -> None:
    push(client, name, max_shard_size=700)
    fault = hub.fault("drip", "GET", times=None)
    assert pull(client, name) == made(client, 0)
    assert fault.hits > 5


def test_a_download_that_stalls_is_taken_up_again(hub: LoopbackHub, client: Client, name: str) -> None:
    push(client, name)
    client.run("from huggingface_hub import constants; constants.HF_HUB_DOWNLOAD_TIMEOUT = 1")
    fault = hub.fault("stall", WEIGHTS)
    assert pull(client, name) == made(client, 0)
    client.run("constants.HF_HUB_DOWNLOAD_TIMEOUT = 10")
    assert fault.hits == 1


@pytest.mark.parametrize("path", [WEIGHTS, "GET /api/models/[^/]+/[^/]+(/revision/.*)?$", "GET /api/models/.*/tree/"])
def test_a_server_that_never_answers_ends_a_pull(hub: LoopbackHub, client: Client, name: str, path: str) -> None:
    """The client as it is would wait for ever for the last two."""
    push(client, name)
    fault = hub.fault("silent", path, times=None)
    with impatient(client):
        error = failed_pull(client, name)
    assert fault.hits
    assert {"TimeoutException", "LocalEntryNotFoundError"} & set(error.kinds), error
    hub.faults.clear()
    assert pull(client, name) == made(client, 0)


def test_a_silent_server_leaves_the_cache(hub: LoopbackHub, client: Client, name: str) -> None:
    push(client, name)
    pull(client, name)
    hub.fault("silent", "GET", times=None)
    with impatient(client):
        assert pull(client, name) == made(client, 0)
        code, out, err = command(client, "info", "--model", f"{name}@never")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("step", ["POST /api/repos/create", "GET /api/models/.*", "POST /.*/commit/"])
def test_a_server_that_never_answers_ends_a_push(hub: LoopbackHub, client: Client, name: str, step: str) -> None:
    first = push(client, name)
    hub.fault("silent", step, times=None)
    with impatient(client), pytest.raises(ClientError) as failure:
        push(client, name, 1)
    assert {"TimeoutException", "HfHubHTTPError"} & set(failure.value.kinds), failure.value
    hub.faults.clear()
    assert hub.repos[name].head == first
    push(client, name, 1)
    assert pull(client, name) == made(client, 1)


def test_limits_that_somebody_has_chosen_stay(hub: LoopbackHub, client: Client, name: str) -> None:
    push(client, name)
    limits = client.run(
        """
        from huggingface_hub.utils import get_session
        limits = {}
        hooks = get_session().event_hooks["request"]
        hooks.append(lambda request: limits.setdefault(request.url.path, request.extensions["timeout"]["read"]))
        digest(LSTMForCausalLM.from_pretrained(name))
        hooks.pop()
        result = limits
        """,
        name=name,
    )
    assert {limit for path, limit in limits.items() if "/resolve/" in path} == {10}
    assert {limit for path, limit in limits.items() if "/api/" in path} == {60}
