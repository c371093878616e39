"""What is asked of the Hub: a recorder stands in for the client, so these tests see the calls, not a server."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import tqdm
from small_models import assert_same_model, causal_lm

from tlstm import LSTMForCausalLM, Tokenizer
from tlstm.hub import download, push

CALLS = ("create_repo", "create_branch", "model_info", "list_repo_files", "create_commit")


class Recorder:
    """Answers the calls that a push makes, for a repo that holds `present`, and keeps what was committed."""

    def __init__(self, present: dict[str, bytes], folder: Path) -> None:
        self.present, self.folder = present, folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.added: dict[str, bytes] = {}
        self.deleted: list[str] = []

    def __call__(self, **options: Any) -> Recorder:
        self.calls.append(("HfApi", options))
        self.token = options["token"]
        return self

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)
        answer = getattr(self, f"answer_{name}")
        signature = getattr(HfApi, name)  # the real client's, so that a call it would refuse fails here too

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = dict(inspect.signature(signature).bind(None, *args, **kwargs).arguments)
            bound.pop("self")
            self.calls.append((name, bound))
            return answer(**bound)

        return call

    def answer_create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def answer_create_branch(self, repo_id: str, **options: Any) -> None:
        return None

    def answer_model_info(self, repo_id: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(sha="f" * 40)

    def answer_list_repo_files(self, repo_id: str, **options: Any) -> list[str]:
        return list(self.present)

    def download_snapshot(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> Path:
        snapshot = self.folder / "downloaded"
        snapshot.mkdir(exist_ok=True)
        for name in allow_patterns:
            (snapshot / name).write_bytes(self.present[name])
        return snapshot

    def answer_create_commit(self, repo_id: str, operations: list, **options: Any) -> str:
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    self.added[operation.path_in_repo] = file.read()
            elif isinstance(operation, CommitOperationDelete):
                self.deleted.append(operation.path_in_repo)
        return "commit"

    def options(self, name: str) -> dict[str, Any]:
        (found,) = [options for call, options in self.calls if call == name]
        return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def make(present: dict[str, bytes] | None = None) -> Recorder:
        recorder = Recorder(present or {}, tmp_path)
        monkeypatch.setattr(push, "HfApi", recorder)
        monkeypatch.setattr(push, "download_snapshot", recorder.download_snapshot)
        return recorder

    return make


class TestPush:
    def test_one_commit_holds_a_whole_checkpoint(self, hub, tmp_path: Path) -> None:
        recorder = hub()
        tokenizer = Tokenizer.train_char(["hello"])
        model = causal_lm()
        result = model.push_to_hub(
            "model", private=True, token="secret", tokenizer=tokenizer, extra_files={"figures/loss.png": b"PNG"}
        )
        assert result == "commit"
        assert recorder.options("HfApi")["token"] == "secret"
        assert recorder.options("create_repo") == {"repo_id": "model", "private": True, "exist_ok": True}
        commit = recorder.options("create_commit")
        assert commit["repo_id"] == "me/model"
        assert commit["commit_message"] == "Upload LSTMForCausalLM"
        assert (commit["create_pr"], commit["revision"], commit["parent_commit"]) == (False, None, "f" * 40)
        assert [name for name, _ in recorder.calls if name == "create_branch"] == []
        assert recorder.deleted == []
        assert b"library_name: tlstm" in recorder.added["README.md"]
        for name, content in recorder.added.items():
            (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pulled" / name).write_bytes(content)
        assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), model)
        assert Tokenizer.from_pretrained(tmp_path / "pulled").encode("hell") == tokenizer.encode("hell")
        assert set(recorder.added) >= {"config.json", "generation_config.json", "figures/loss.png"}
        assert not any(name.startswith(".") for name in recorder.added)

    def test_branch_pull_request_and_pinned_parent(self, hub) -> None:
        recorder = hub()
        causal_lm().push_to_hub(
            "me/model",
            revision="dev",
            create_pr=True,
            parent_commit="a" * 40,
            commit_message="m",
            commit_description="d",
        )
        assert recorder.options("create_branch") == {"repo_id": "me/model", "branch": "dev", "exist_ok": True}
        commit = recorder.options("create_commit")
        del commit["operations"]
        assert commit == {
            "repo_id": "me/model", "revision": "dev", "create_pr": True, "parent_commit": "a" * 40,
            "commit_message": "m", "commit_description": "d",
        }  # fmt: skip
        recorder = hub()
        causal_lm().push_to_hub("me/model", revision="refs/pr/1")
        assert "create_branch" not in [name for name, _ in recorder.calls]

    @pytest.mark.parametrize(("size", "gone"), [("5GB", "shards"), (700, "single")])
    def test_the_former_weights_go_in_the_same_commit(self, hub, size: int | str, gone: str) -> None:
        shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        weights = {"shards": [*shards, "model.safetensors.index.json"], "single": ["model.safetensors"]}[gone]
        others = ["notes.txt", "model.fp16.safetensors", "sub/model.safetensors", "model.ckpt", "README.md"]
        recorder = hub(dict.fromkeys([*weights, *others, "config.json"], b""))
        causal_lm().push_to_hub("me/model", max_shard_size=size)
        assert recorder.deleted == sorted(weights)
        assert "README.md" not in recorder.added, "a card that is there is the user's"
        assert ("model.safetensors" in recorder.added) == (size == "5GB")

    def test_tags_join_those_of_the_card(self, hub) -> None:
        card = b"---\nlicense: mit\ntags:\n- lstm\n---\n\n# My words\n"
        recorder = hub({"README.md": card})
        causal_lm().push_to_hub("me/model", tags=["shakespeare", "lstm"])
        text = recorder.added["README.md"].decode()
        assert "- lstm\n- shakespeare\n" in text
        assert "license: mit" in text
        assert "# My words" in text
        recorder = hub()
        causal_lm().push_to_hub("me/model", tags=["poems"], extra_files={"README.md": card})
        assert b"- lstm\n- poems\n" in recorder.added["README.md"]

    def test_save_pretrained_pushes_where_asked(self, hub, tmp_path: Path) -> None:
        recorder = hub()
        causal_lm().save_pretrained(tmp_path / "my-model", push_to_hub=True, private=True)
        assert recorder.options("create_repo")["repo_id"] == "my-model"
        assert recorder.options("create_repo")["private"] is True
        assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "my-model"), causal_lm())
        recorder = hub()
        causal_lm().save_pretrained(tmp_path / "my-model", push_to_hub=True, repo_id="me/other")
        assert recorder.options("create_repo")["repo_id"] == "me/other"


class TestPull:
    def test_one_snapshot_with_only_what_is_needed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        causal_lm(1).save_pretrained(tmp_path / "sub", variant="fp16")
        calls: list[dict[str, Any]] = []

        def snapshot_download(repo_id: str, **options: Any) -> str:
            calls.append({"repo_id": repo_id, **options})
            return str(tmp_path)

        monkeypatch.setattr(download, "snapshot_download", snapshot_download)
        model = LSTMForCausalLM.from_pretrained(
            "user/model",
            revision="refs/pr/1",
            subfolder="sub",
            variant="fp16",
            token="secret",
            cache_dir=tmp_path / "cache",
            force_download=True,
            local_files_only=True,
        )
        assert_same_model(model, causal_lm(1))
        (call,) = calls
        wanted = call.pop("allow_patterns")
        assert issubclass(call.pop("tqdm_class"), tqdm)
        assert call == {
            "repo_id": "user/model", "revision": "refs/pr/1", "cache_dir": str(tmp_path / "cache"), "token": "secret",
            "force_download": True, "local_files_only": True, "library_name": "tlstm",
            "library_version": push.__version__,
        }  # fmt: skip
        assert "sub/model.fp16.safetensors" in wanted
        assert "sub/model.fp16-*-of-*.safetensors" in wanted
        assert "sub/tokenizer.json" in wanted
        assert all(pattern.startswith("sub/") and not pattern.endswith((".bin", ".pt")) for pattern in wanted)

    def test_errors_of_the_client_reach_the_caller(self, tmp_path: Path) -> None:
        """The real client, told not to use the network."""
        with pytest.raises(LocalEntryNotFoundError):
            LSTMForCausalLM.from_pretrained("user/model", cache_dir=tmp_path, local_files_only=True)
        with pytest.raises(ValueError, match=r"[Rr]epo id"):
            LSTMForCausalLM.from_pretrained("user/mo del", cache_dir=tmp_path, local_files_only=True)

    def test_a_snapshot_in_the_cache_loads_without_network(self, tmp_path: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "models--user--model"
        causal_lm(3).save_pretrained(repo / "snapshots" / commit, max_shard_size=700)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        for revision in (None, "main", commit):
            model = LSTMForCausalLM.from_pretrained(
                "user/model", revision=revision, cache_dir=tmp_path, local_files_only=True, dtype=torch.float64
            )
            assert_same_model(model, causal_lm(3).double())
