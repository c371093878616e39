"""What goes wrong on the way to a Hub and back: nothing is lost, and the user reads a clear error, or nothing."""

from __future__ import annotations

import pytest
from hub.calls import failed_pull, made, pull, push
from hub.client import Client, ClientError
from hub.loopback import LoopbackHub

WEIGHTS = r"GET /.*/resolve/\w+/model\.safetensors"
BUSY = (429, 500, 503)


class TestPull:
    @pytest.mark.parametrize("status", BUSY)
    @pytest.mark.parametrize("path", ["/api/models/[^/]+/[^/]+$|/revision/", "/api/models/.*/tree/", WEIGHTS])
    def test_a_server_busy_once_is_asked_again(self, hub, client, name: str, path: str, status: int) -> None:
        push(client, name)
        fault = hub.fault("status", path, status=status)
        assert pull(client, name) == made(client, 0)
        assert fault.hits == 1

    @pytest.mark.parametrize("status", BUSY)
    def test_a_server_that_stays_busy_is_named(self, hub, client, name: str, status: int) -> None:
        push(client, name)
        hub.fault("status", "GET", status=status, times=None)
        error = failed_pull(client, name)
        assert {"HfHubHTTPError", "LocalEntryNotFoundError"} & set(error.kinds)
        assert str(status) in error.text
        hub.faults.clear()
        assert pull(client, name) == made(client, 0)

    def test_a_cut_connection_is_taken_up_again(self, hub, client, name: str) -> None:
        push(client, name)
        fault = hub.fault("cut", WEIGHTS, times=3)
        assert pull(client, name) == made(client, 0)
        assert fault.hits == 3

    def test_a_file_that_ends_early_is_named_and_not_kept(self, hub, client, name: str) -> None:
        push(client, name)
        fault = hub.fault("short", WEIGHTS, times=None)
        error = failed_pull(client, name)
        assert "OSError" in error.kinds
        assert "model.safetensors" in error.text
        assert fault.hits
        hub.faults.clear()
        assert pull(client, name) == made(client, 0)

    def test_wrong_bytes_are_fetched_again(self, hub, client, name: str) -> None:
        push(client, name)
        fault = hub.fault("wrong", WEIGHTS)
        assert pull(client, name) == made(client, 0)
        assert fault.hits == 1

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "model-00002-of-"])
    def test_bytes_that_stay_wrong_are_named_and_not_kept(self, hub, client, name: str, file: str) -> None:
        push(client, name, **({"max_shard_size": 700} if "-of-" in file else {}))
        hub.fault("wrong", f"GET /.*/resolve/.*/{file}", times=None)
        error = failed_pull(client, name)
        assert error.kinds[0] == "DownloadError"
        assert "OSError" in error.kinds
        assert file in error.text
        assert name in error.text
        hub.faults.clear()
        assert pull(client, name) == made(client, 0)

    def test_wrong_bytes_under_force_download(self, hub, client, name: str) -> None:
        push(client, name)
        pull(client, name)
        hub.fault("wrong", WEIGHTS)
        assert pull(client, name, force_download=True) == made(client, 0)

    def test_a_tokenizer_with_wrong_bytes(self, hub, client, name: str) -> None:
        push(client, name)
        client.run("causal_lm().push_to_hub(name, tokenizer=Tokenizer.bytes())", name=name)
        hub.fault("wrong", "GET /.*/resolve/.*/tokenizer.json", times=None)
        with pytest.raises(ClientError, match=r"tokenizer\.json") as failure:
            client.run("Tokenizer.from_pretrained(name)", name=name)
        assert failure.value.kinds[0] == "DownloadError"
        hub.faults.clear()
        assert client.run("result = Tokenizer.from_pretrained(name).kind", name=name) == "byte"

    def test_a_server_gone_between_two_files(self, hub, client, name: str) -> None:
        push(client, name)
        hub.fault("gone", WEIGHTS)
        error = failed_pull(client, name)
        assert {"NetworkError", "LocalEntryNotFoundError"} & set(error.kinds), error
        code, _, err = client.run("result = tlstm_command('info', '--model', name)", name=name)
        assert (code, err.count("\n")) == (2, 1)
        hub.start()
        assert pull(client, name) == made(client, 0)


class TestRights:
    @pytest.mark.parametrize(
        ("token", "private", "gated", "kind", "status"),
        [
            ("hf_stranger", True, False, "RepositoryNotFoundError", 404),
            (False, True, False, "RepositoryNotFoundError", 401),
            ("hf_stranger", False, True, "GatedRepoError", 403),
            (False, False, True, "GatedRepoError", 401),
            ("hf_wrong", False, False, "HfHubHTTPError", 401),
        ],
    )
    def test_who_may_not_read(self, hub, client, name, token, private, gated, kind, status) -> None:
        push(client, name)
        hub.repos[name].private, hub.repos[name].gated = private, gated
        error = failed_pull(client, name, token=token)
        assert (error.kinds[0], error.status) == (kind, status)
        assert pull(client, name, token="hf_owner") == made(client, 0)

    @pytest.mark.parametrize(("token", "status"), [("hf_stranger", 403), ("hf_wrong", 401)])
    def test_who_may_not_write(self, hub, client, name: str, token: str, status: int) -> None:
        first = push(client, name)
        with pytest.raises(ClientError) as failure:
            push(client, name, 1, token=token)
        assert "HfHubHTTPError" in failure.value.kinds
        assert failure.value.status == status
        assert hub.repos[name].head == first

    def test_a_stranger_may_propose(self, hub, client, name: str) -> None:
        first = push(client, name)
        push(client, name, 1, token="hf_stranger", create_pr=True)
        assert hub.repos[name].head == first
        assert pull(client, name, revision="refs/pr/1") == made(client, 1)

    def test_what_is_not_there(self, hub, client, name: str) -> None:
        assert failed_pull(client, name).kinds[0] == "RepositoryNotFoundError"
        push(client, name)
        assert failed_pull(client, name, revision="never").kinds[0] == "RevisionNotFoundError"
        assert failed_pull(client, name, revision="0" * 40).kinds[0] == "RevisionNotFoundError"
        missing = failed_pull(client, name, variant="never")
        assert missing.kinds[0] == "CheckpointNotFoundError"
        assert "model.never.safetensors" in missing.text
        with pytest.raises(ClientError, match=r"tokenizer\.json") as failure:
            client.run("Tokenizer.from_pretrained(name)", name=name)
        assert failure.value.kinds[0] == "CheckpointNotFoundError"


class TestPush:
    STEPS = ("POST /api/repos/create", "GET /api/models/.*", "POST /.*/preupload/")
    LFS_STEPS = ("POST /.*/objects/batch", r"PUT /lfs/\w+$", "POST /.*/verify")
    LAST_STEP = "POST /.*/commit/"

    def steps(self, hub: LoopbackHub) -> list[tuple[int, str]]:
        """With a model for each, so that no step finds its files uploaded by the one before."""
        lfs_steps = self.LFS_STEPS if hub.lfs_suffixes else ()
        return list(enumerate((*self.STEPS, *lfs_steps, self.LAST_STEP), start=10))

    def test_a_server_gone_at_any_step_leaves_the_old_model(self, hub, client, name: str) -> None:
        first = push(client, name)
        for seed, step in self.steps(hub):
            fault = hub.fault("gone", step)
            with pytest.raises(ClientError) as failure:
                push(client, name, seed, max_shard_size=700)
            assert fault.hits == 1, step
            assert {"TransportError", "HfHubHTTPError", "OSError"} & set(failure.value.kinds), failure.value
            hub.start()
            hub.faults.clear()
            assert hub.repos[name].head == first
            assert pull(client, name, force_download=True) == made(client, 0)
        push(client, name, 1, max_shard_size=700)
        assert pull(client, name) == made(client, 1)

    @pytest.mark.parametrize("status", BUSY)
    def test_a_server_that_stays_busy_at_any_step(self, hub, client, name: str, status: int) -> None:
        first = push(client, name)
        for seed, step in self.steps(hub):
            hub.fault("status", step, status=status, times=None)
            with pytest.raises(ClientError) as failure:
                push(client, name, seed, max_shard_size=700)
            assert "HfHubHTTPError" in failure.value.kinds
            assert failure.value.status == status
            hub.faults.clear()
            assert hub.repos[name].head == first
        push(client, name, 1, max_shard_size=700)
        assert pull(client, name) == made(client, 1)

    def test_an_upload_is_repeated(self, hub, lfs_client: Client, name: str) -> None:
        hub.lfs_suffixes, hub.part_size = (".safetensors",), 1000
        faults = [
            hub.fault("status", r"PUT /lfs/\w+/2", status=503),
            hub.fault("status", r"POST /lfs/\w+$", status=500),
        ]
        push(lfs_client, name)
        assert [fault.hits for fault in faults] == [1, 1]
        assert pull(lfs_client, name) == made(lfs_client, 0)
