"""No room for what is pulled, in the cache or in the folder: told with place and remedy, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub.calls import command, failed_pull, made, pull, push
from hub.client import Client
from hub.loopback import LoopbackHub
from small_models import assert_same_model, causal_lm

from tlstm import LSTMForCausalLM


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB, in memory. The models here that are to fit on it have 6 kB, those that are not, 250 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("cannot mount a small disk here: there is no `mount`")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}; it takes root's rights")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@contextmanager
def small_files(client: Client) -> Iterator[None]:
    """In here the client's system lets no file grow beyond 128 kB, which any user may ask of it."""
    client.run(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limit[1]))
        """
    )
    try:
        yield
    finally:
        client.run("resource.setrlimit(resource.RLIMIT_FSIZE, limit)")


def push_large(client: Client, name: str) -> str:
    """Push a model of 250 kB; the hash of its weights."""
    code = "model = causal_lm(5, hidden_size=65); model.push_to_hub(name); result = digest(model)"
    return client.run(code, name=name)


class TestCache:
    def test_full(self, hub: LoopbackHub, client: Client, name: str, small_disk: Path, tmp_path: Path) -> None:
        push(client, name)
        assert pull(client, name, cache_dir=str(small_disk)) == made(client, 0)
        large = push_large(client, name)
        error = failed_pull(client, name, cache_dir=str(small_disk))
        assert "OSError" in error.kinds
        for part in (f"cannot store {name} in the cache {small_disk}", "No space left", "free some space"):
            assert part in error.text
        first = hub.repos[name].history("main")[1].oid
        assert pull(client, name, cache_dir=str(small_disk), revision=first) == made(client, 0), "what was there stays"
        assert pull(client, name, cache_dir=str(tmp_path / "roomy")) == large
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        assert pull(client, name, cache_dir=str(small_disk)) == large, "once there is room, it works"

    def test_a_limit_on_files(self, hub: LoopbackHub, client: Client, name: str, tmp_path: Path) -> None:
        large = push_large(client, name)
        with small_files(client):
            error = failed_pull(client, name, cache_dir=str(tmp_path))
            code, out, err = command(client, "info", "--model", name)
        assert f"cannot store {name} in the cache {tmp_path}: File too large; raise the limit" in error.text
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "cannot store" in err
        assert pull(client, name, cache_dir=str(tmp_path)) == large


class TestOutputFolder:
    def test_full(self, hub: LoopbackHub, client: Client, name: str, small_disk: Path) -> None:
        folder = small_disk / "model"
        push(client, name)
        assert command(client, "pull", name, folder)[0] == 0
        push_large(client, name)
        code, out, err = command(client, "pull", name, folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        for part in (str(folder), "No space left", "unchanged", "free some space"):
            assert part in err
        assert_same_model(LSTMForCausalLM.from_pretrained(folder), causal_lm(0))
        assert not list(folder.glob(".tlstm*"))

    def test_a_limit_on_files(self, hub: LoopbackHub, client: Client, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        push(client, name)
        assert command(client, "pull", name, folder)[0] == 0
        large = push_large(client, name)
        pull(client, name)  # into the cache, where there is room
        with small_files(client):
            code, out, err = command(client, "pull", name, folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "File too large" in err
        assert "unchanged" in err
        assert_same_model(LSTMForCausalLM.from_pretrained(folder), causal_lm(0))
        assert command(client, "pull", name, folder)[0] == 0
        assert client.run("result = digest(LSTMForCausalLM.from_pretrained(folder))", folder=str(folder)) == large

    def test_a_push_that_has_no_room_to_stage(self, hub: LoopbackHub, client: Client, name: str) -> None:
        first = push(client, name)
        with small_files(client):
            with pytest.raises(Exception, match=r"File too large") as failure:
                push_large(client, name)
            assert "OSError" in failure.value.kinds
        assert hub.repos[name].head == first
