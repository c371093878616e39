"""Two processes at one model: two that pull it into one cache, two that push to one branch, and lost answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub.calls import made, pull, push
from hub.client import Client, ClientError
from hub.loopback import LoopbackHub

WEIGHTS = r"GET /.*/resolve/\w+/model\.safetensors"
COMMIT = "POST /api/models/.*/commit/"
SINGLE = {"max_shard_size": "5GB"}
SHARDED = {"max_shard_size": 700}


@pytest.fixture
def clients(hub: LoopbackHub, default_client: Client, lfs_client: Client) -> list[Client]:
    """Two processes; every file travels in the commits, because one of them would send large ones by Xet."""
    return [default_client, lfs_client]


def test_two_pull_into_one_cache(hub: LoopbackHub, clients: list[Client], name: str, tmp_path: Path) -> None:
    push(clients[0], name, **SHARDED)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda client: pull(client, name, cache_dir=str(tmp_path)), clients))
    assert found == [made(clients[0], 0)] * 2
    blobs = [path.name for path in tmp_path.glob("models--*/blobs/*")]
    assert not [blob for blob in blobs if "incomplete" in blob]
    assert len(blobs) == len(hub.repos[name].names() - {".gitattributes", "README.md"})


def test_two_pull_and_the_first_gets_wrong_bytes(
    hub: LoopbackHub, clients: list[Client], name: str, tmp_path: Path
) -> None:
    """Neither takes what the other has not checked, nor loses what the other throws away."""
    push(clients[0], name)
    fault = hub.fault("wrong", WEIGHTS, times=2)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda client: pull(client, name, cache_dir=str(tmp_path)), clients))
    assert found == [made(clients[0], 0)] * 2
    assert fault.hits == 2


def test_two_push_at_once_and_both_arrive_one_after_the_other(
    hub: LoopbackHub, clients: list[Client], name: str
) -> None:
    """Both have looked at the same commit before either replaces it: the second looks again."""
    push(clients[0], name)
    fault = hub.fault("meet", COMMIT, times=2)
    forms = [SINGLE, SHARDED]
    with ThreadPoolExecutor() as pool:
        commits = list(pool.map(lambda n: push(clients[n], name, n + 1, **forms[n]), (0, 1)))
    assert fault.hits == 2
    repo = hub.repos[name]
    assert [commit.oid for commit in repo.history("main")][:2] in (commits, commits[::-1])
    for seed, commit in zip((1, 2), commits, strict=True):
        weights = {file for file in repo.names(commit) if "safetensors" in file}
        assert (weights == {"model.safetensors"}) == (seed == 1), "stale files of the other would be a mix"
        assert pull(clients[0], name, revision=commit) == made(clients[0], seed)


def test_two_push_over_a_pinned_commit_and_one_is_told(hub: LoopbackHub, clients: list[Client], name: str) -> None:
    first = push(clients[0], name)
    hub.fault("meet", COMMIT, times=2)

    def attempt(number: int) -> str | ClientError:
        try:
            return push(clients[number], name, number + 1, parent_commit=first, **[SINGLE, SHARDED][number])
        except ClientError as error:
            return error

    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(attempt, (0, 1)))
    (loser,) = [outcome for outcome in outcomes if isinstance(outcome, ClientError)]
    assert (loser.status, "HfHubHTTPError" in loser.kinds) == (412, True)
    assert "commit has happened since" in loser.text
    winner = outcomes.index(hub.repos[name].head)
    assert len(hub.repos[name].history("main")) == 3
    assert pull(clients[0], name) == made(clients[0], winner + 1)


@pytest.mark.parametrize("form", [SINGLE, SHARDED])
def test_a_commit_whose_answer_is_lost(hub: LoopbackHub, clients: list[Client], name: str, form: dict) -> None:
    """The Hub has the new model, whole, whether or not the pusher learns of it."""
    push(clients[0], name)
    fault = hub.fault("lost", COMMIT)
    try:
        push(clients[0], name, 1, **form)
    except ClientError as error:
        assert {"TransportError", "HfHubHTTPError"} & set(error.kinds), error  # noqa: PT017
    assert fault.hits == 1
    assert pull(clients[0], name) == made(clients[0], 1)
    push(clients[0], name, 1, **form)
    assert pull(clients[0], name) == made(clients[0], 1)
