"""Models to a Hub and back, with the real client: by Git LFS, and with all files inside the commits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub.calls import made, pull, push
from hub.client import Client, ClientError
from hub.loopback import LoopbackHub

INITIAL = {".gitattributes"}
MODEL = {"README.md", "config.json", "generation_config.json"}
SINGLE = {"model.safetensors"}
COMMIT = r"POST /api/models/.*/commit/"


def sent(hub: LoopbackHub, pattern: str) -> list[str]:
    return [request for request in hub.requests if re.search(pattern, request)]


class TestPush:
    def test_one_commit_makes_a_private_repo_a_whole_model(self, hub, client, name: str) -> None:
        ids = client.run(
            """
            tokenizer = Tokenizer.train_char(["hello world"])
            info = causal_lm(vocab_size=tokenizer.vocab_size).push_to_hub(
                name, private=True, tokenizer=tokenizer, tags=["greeting"],
                commit_message="First", commit_description="of all",
            )
            result = [info.oid, tokenizer.encode("hold")]
            """,
            name=name,
        )
        repo = hub.repos[name]
        assert (repo.private, repo.head) == (True, ids[0])
        assert repo.names() == INITIAL | MODEL | SINGLE | {"tokenizer.json", "tokenizer_config.json"}
        (commit, first) = repo.history("main")
        assert (commit.title, commit.message, first.parent) == ("First", "of all", None)
        assert commit.files["model.safetensors"].lfs == bool(hub.lfs_suffixes)
        card = commit.files["README.md"].content.decode()
        assert "library_name: tlstm" in card
        assert "- greeting" in card
        loaded = client.run(
            """
            model, tokenizer = LSTMForCausalLM.from_pretrained(name), Tokenizer.from_pretrained(name)
            result = [digest(model) == digest(causal_lm(vocab_size=tokenizer.vocab_size)), tokenizer.encode("hold")]
            """,
            name=name,
        )
        assert loaded == [True, ids[1]]

    def test_an_int8_model_goes_there_and_back(self, client, name: str) -> None:
        same = client.run(
            """
            from tlstm.quantization import quantize

            model = causal_lm()
            quantize(model)
            model.push_to_hub(name)
            loaded = LSTMForCausalLM.from_pretrained(name)
            result = [digest(loaded) == digest(model), loaded.config.quantization]
            """,
            name=name,
        )
        assert same == [True, "int8"]

    def test_large_files_travel_in_parts(self, hub, lfs_client: Client, name: str) -> None:
        hub.lfs_suffixes, hub.part_size = (".safetensors",), 1000
        push(lfs_client, name)
        size = len(hub.repos[name].find("main").files["model.safetensors"].content)
        assert len(sent(hub, r"PUT /lfs/\w+/\d+$")) == -(-size // 1000) > 2
        assert pull(lfs_client, name) == made(lfs_client, 0)

    def test_what_is_there_is_not_sent_again(self, hub, client, name: str) -> None:
        first = push(client, name)
        hub.requests.clear()
        assert push(client, name) == first
        assert sent(hub, f"PUT /lfs|{COMMIT}") == []
        assert len(hub.repos[name].commits) == 2

    def test_no_stale_weights_stay(self, hub, client, name: str) -> None:
        push(client, name)
        push(client, name, 1, max_shard_size=700)
        sharded = hub.repos[name].names()
        shards = {file for file in sharded if "-of-" in file}
        assert len(shards) > 1
        assert sharded == INITIAL | MODEL | shards | {"model.safetensors.index.json"}
        assert pull(client, name) == made(client, 1)
        push(client, name, 2, max_shard_size=1500)
        fewer = {file for file in hub.repos[name].names() if "-of-" in file}
        assert fewer
        assert not fewer & shards
        assert pull(client, name) == made(client, 2)
        push(client, name, 3)
        assert hub.repos[name].names() == INITIAL | MODEL | SINGLE
        assert pull(client, name) == made(client, 3)
        assert len(hub.repos[name].commits) == 5, "one commit for each push"

    def test_a_variant_and_the_users_files_stay(self, hub, client, name: str) -> None:
        push(client, name)
        client.run("api.upload_file(path_or_fileobj=b'mine', path_in_repo='notes/a.txt', repo_id=name)", name=name)
        push(client, name, 1, variant="other")
        assert hub.repos[name].names() == INITIAL | MODEL | SINGLE | {"notes/a.txt", "model.other.safetensors"}
        assert [pull(client, name), pull(client, name, variant="other")] == [made(client, 0), made(client, 1)]

    def test_pull_request_branch_and_tag(self, hub, client, name: str) -> None:
        first = push(client, name)
        proposed = client.run(
            """
            info = causal_lm(1).push_to_hub(name, create_pr=True)
            result = [info.oid, info.pr_revision]
            """,
            name=name,
        )
        assert proposed[1] == "refs/pr/1"
        assert hub.repos[name].head == first
        branch = push(client, name, 2, revision="dev")
        client.run("api.create_tag(name, tag='v1.0', revision='dev')", name=name)
        push(client, name, 3, revision="dev")
        push(client, name, 4, revision="refs/pr/1")
        assert hub.repos[name].head == first
        wanted = {None: 0, "main": 0, first: 0, "refs/pr/1": 4, proposed[0]: 1, "dev": 3, "v1.0": 2, branch: 2}
        found = {revision: pull(client, name, revision=revision) for revision in wanted}
        assert found == {revision: made(client, seed) for revision, seed in wanted.items()}

    def test_a_stale_parent_is_refused(self, hub, client, name: str) -> None:
        first = push(client, name)
        second = push(client, name, 1, parent_commit=first)
        with pytest.raises(ClientError) as failure:
            push(client, name, 2, parent_commit=first)
        assert "HfHubHTTPError" in failure.value.kinds
        assert failure.value.status == 412
        assert hub.repos[name].head == second
        assert pull(client, name) == made(client, 1)

    @pytest.mark.parametrize("times", [1, 99])
    def test_a_push_between_listing_and_commit(self, hub, client, name: str, times: int) -> None:
        """Two at once: the later one takes the earlier one's weights away, or is refused."""
        push(client, name, max_shard_size=700)
        repo = hub.repos[name]
        shards, commit = repo.find("main").files, repo.commit
        push(client, name, 1)
        left = iter(range(times))

        def commit_after_another(*args):
            if next(left, None) is not None:
                repo.refs["refs/heads/main"] = repo.add_commit("another", "", shards, repo.head).oid
            return commit(*args)

        repo.commit = commit_after_another
        if times == 1:
            push(client, name, 2)
            assert repo.names() == INITIAL | MODEL | SINGLE
            assert pull(client, name) == made(client, 2)
        else:
            with pytest.raises(ClientError) as failure:
                push(client, name, 2)
            assert failure.value.status == 412
            assert pull(client, name) == made(client, 0)

    def test_save_pretrained_pushes_what_it_saves(self, hub, client, name: str, tmp_path: Path) -> None:
        client.run(
            "causal_lm(5).save_pretrained(folder, push_to_hub=True, repo_id=name)", name=name, folder=str(tmp_path)
        )
        files = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
        assert hub.repos[name].names() == files | {"README.md"} | INITIAL
        assert pull(client, name) == made(client, 5)


class TestPull:
    def test_all_files_come_from_one_commit(self, hub, client, name: str) -> None:
        first = push(client, name, max_shard_size=700)
        hub.requests.clear()
        pull(client, name)
        resolved = {re.search(r"/resolve/(\w+)/", request)[1] for request in sent(hub, "/resolve/")}
        assert resolved == {first}
        assert len(sent(hub, "/revision/|GET /api/models/[^/]+/[^/]+$")) == 1

    def test_a_push_between_two_downloads_mixes_nothing(self, hub, client, name: str) -> None:
        push(client, name, max_shard_size=700)
        repo = hub.repos[name]
        answer_tree, old = repo.tree, repo.head

        def tree_then_push(*args):
            entries = answer_tree(*args)
            repo.refs["refs/heads/main"] = repo.add_commit("empty", "", {}, repo.head).oid
            return entries

        repo.tree = tree_then_push
        assert pull(client, name) == made(client, 0)
        assert repo.head != old

    def test_subfolder_and_nothing_but_the_checkpoint(self, hub, client, name: str, tmp_path: Path) -> None:
        client.run(
            """
            causal_lm(7).save_pretrained(folder + "/runs/best", tokenizer=Tokenizer.bytes())
            api.create_repo(name)
            api.upload_folder(folder_path=folder, repo_id=name)
            api.upload_file(path_or_fileobj=b"x", path_in_repo="runs/best/pytorch_model.bin", repo_id=name)
            """,
            name=name,
            folder=str(tmp_path),
        )
        assert pull(client, name, subfolder="runs/best") == made(client, 7)
        assert client.run("result = Tokenizer.from_pretrained(name, subfolder='runs/best').kind", name=name) == "byte"
        assert sent(hub, r"/resolve/.*\.bin") == []
        with pytest.raises(ClientError) as failure:
            pull(client, name)
        assert "CheckpointNotFoundError" in failure.value.kinds

    def test_options_of_the_cache(self, hub, client, name: str, tmp_path: Path) -> None:
        push(client, name)
        cache = str(tmp_path / "cache")
        with pytest.raises(ClientError) as failure:
            pull(client, name, cache_dir=cache, local_files_only=True)
        assert "LocalEntryNotFoundError" in failure.value.kinds
        expected = made(client, 0)
        assert pull(client, name, cache_dir=cache) == expected
        hub.requests.clear()
        assert pull(client, name, cache_dir=cache, local_files_only=True) == expected
        assert hub.requests == []
        assert pull(client, name, cache_dir=cache) == expected
        assert sent(hub, "/resolve/") == [], "the files are in the cache already"
        assert pull(client, name, cache_dir=cache, force_download=True) == expected
        assert sent(hub, r"GET /.*/resolve/\w+/model\.safetensors")

    def test_offline_from_the_cache(self, hub, client, name: str, tmp_path: Path) -> None:
        first = push(client, name, tokenizer=None)
        push(client, name, 1, revision="dev")
        cache = str(tmp_path)
        for revision in (None, "dev"):
            pull(client, name, cache_dir=cache, revision=revision)
        hub.requests.clear()
        offline = Client(hub.url, tmp_path, HF_HUB_OFFLINE="1")
        try:
            found = [pull(offline, name, cache_dir=cache, revision=revision) for revision in (None, "dev", first)]
            assert found == [made(client, seed) for seed in (0, 1, 0)]
            with pytest.raises(ClientError) as failure:
                pull(offline, name, cache_dir=cache, revision="never-pulled")
            assert "LocalEntryNotFoundError" in failure.value.kinds
        finally:
            offline.close()
        assert hub.requests == []

    def test_a_hub_that_is_down_leaves_the_cache(self, hub, client, name: str) -> None:
        push(client, name)
        expected = pull(client, name)
        hub.stop()
        assert pull(client, name) == expected


class TestCommandLine:
    def test_generate_and_info_by_repo_and_revision(self, hub, client, name: str) -> None:
        client.run(
            """
            tokenizer = Tokenizer.bytes()
            for seed, revision in ((0, None), (1, "dev")):
                model = causal_lm(seed, vocab_size=tokenizer.vocab_size, hidden_size=7 + seed)
                model.push_to_hub(name, revision=revision, tokenizer=tokenizer)
            """,
            name=name,
        )
        texts = []
        for model in (name, f"{name}@dev"):
            arguments = ["--model", model, "--prompt", "Hi", "--max-new-tokens", "9", "--greedy", "--json", "--quiet"]
            code, out, err = client.run("result = tlstm_command('generate', *arguments)", arguments=arguments)
            assert code == 0, err
            report = json.loads(out)
            assert report["model"] == model
            assert len(report["sequences"][0]["tokens"]) == 9
            texts.append(report["sequences"][0]["tokens"])
            code, out, err = client.run("result = tlstm_command('info', '--json', '--model', model)", model=model)
            assert code == 0, err
            texts.append(json.loads(out)["parameters"]["total"])
        count = "result = causal_lm(vocab_size=Tokenizer.bytes().vocab_size, hidden_size=size).num_parameters()"
        assert [texts[1], texts[3]] == [client.run(count, size=size) for size in (7, 8)]
        assert texts[0] != texts[2]

    def test_an_unknown_repo_is_told_in_one_line(self, hub, client, name: str) -> None:
        for model in (name, f"{name}@dev"):
            code, out, err = client.run(
                "result = tlstm_command('generate', '--prompt', 'Hi', '--model', model)", model=model
            )
            assert (code, out) == (2, "")
            assert err.count("\n") == 1
            assert "Repository Not Found" in err
            assert "no local folder" in err
