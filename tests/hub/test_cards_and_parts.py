"""What else a repo holds: a tokenizer or a configuration pushed by itself, and the model card."""

from __future__ import annotations

import re

import pytest
from hub.client import Client, ClientError
from hub.loopback import LoopbackHub
from hub.store import File
from huggingface_hub import ModelCard

PARTS = {
    "tokenizer": ("Tokenizer.train_char(text)", {"tokenizer.json", "tokenizer_config.json"}),
    "config": ("LSTMConfig(vocab_size=len(text), hidden_size=7)", {"config.json"}),
}


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest) -> tuple[str, set[str]]:
    return PARTS[request.param]


def push_part(client: Client, part: tuple[str, set[str]], name: str, text: str = "abc", **options) -> list[str]:
    return client.run(
        f"from tlstm import LSTMConfig\ni = {part[0]}.push_to_hub(name, **options)\nresult = [i.oid, i.pr_url]",
        name=name,
        text=text,
        options=options,
    )


def card_of(hub: LoopbackHub, name: str, revision: str = "main") -> str:
    return hub.repos[name].find(revision).files["README.md"].content.decode()


def edit_card(hub: LoopbackHub, name: str, card: str) -> None:
    repo = hub.repos[name]
    files = repo.find("main").files | {"README.md": File(card.encode(), False)}
    repo.refs["refs/heads/main"] = repo.add_commit("edited", "", files, repo.head).oid


class TestParts:
    def test_one_commit_in_a_repo_of_its_own(self, hub, client, name: str, part) -> None:
        oid, _ = push_part(client, part, name, private=True, commit_message="First", commit_description="of all")
        repo = hub.repos[name]
        assert (repo.private, repo.head, len(repo.commits)) == (True, oid, 2)
        assert repo.names() == part[1] | {".gitattributes", "README.md"}
        assert (repo.find("main").title, repo.find("main").message) == ("First", "of all")
        assert "library_name: tlstm" in card_of(hub, name)

    def test_the_rest_of_the_repo_stays(self, hub, client, name: str, part) -> None:
        client.run("causal_lm(vocab_size=3).push_to_hub(name, max_shard_size=300)", name=name)
        before, card = hub.repos[name].names(), card_of(hub, name)
        push_part(client, part, name)
        assert hub.repos[name].names() == before | part[1]
        assert card_of(hub, name) == card
        assert hub.repos[name].find("main").title.startswith("Upload ")

    def test_branch_pull_request_and_parent(self, hub, client, name: str, part) -> None:
        first, _ = push_part(client, part, name)
        branch, _ = push_part(client, part, name, "abcd", revision="dev")
        _, url = push_part(client, part, name, "abcde", create_pr=True)
        assert url == f"{hub.url}/{name}/discussions/1"
        assert (hub.repos[name].head, hub.repos[name].find("dev").oid) == (first, branch)
        second, _ = push_part(client, part, name, "abcdef", parent_commit=first)
        with pytest.raises(ClientError) as failure:
            push_part(client, part, name, "abcdefg", parent_commit=first)
        assert (failure.value.status, hub.repos[name].head) == (412, second)
        with pytest.raises(ClientError) as failure:
            push_part(client, part, name, token="hf_stranger")
        assert failure.value.status == 403

    def test_they_come_back(self, hub, client, name: str) -> None:
        for part in PARTS.values():
            push_part(client, part, name, "hold the door")
        assert client.run(
            """
            config = LSTMConfig.from_json_file(api.hf_hub_download(name, "config.json"))
            result = [Tokenizer.from_pretrained(name).encode("hold"), config.to_dict()]
            """,
            name=name,
        ) == client.run(
            """
            text = "hold the door"
            config = LSTMConfig(vocab_size=len(text), hidden_size=7)
            result = [Tokenizer.train_char(text).encode("hold"), config.to_dict()]
            """
        )


class TestCards:
    def test_the_snippet_of_a_pushed_card_runs(self, hub, client, name: str) -> None:
        """And it is that of the repo, whatever folder the model was saved in."""
        client.run(
            """
            tokenizer = Tokenizer.train_char("some words")
            causal_lm(vocab_size=tokenizer.vocab_size).push_to_hub(name, tokenizer=tokenizer)
            """,
            name=name,
        )
        card = ModelCard(card_of(hub, name))
        assert (card.data.library_name, card.data.pipeline_tag) == ("tlstm", "text-generation")
        (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert f'path = "{name}"' in snippet
        length = client.run(snippet + "\nresult = len(ids[0])")
        assert length == 201

    def test_a_model_takes_the_place_of_the_short_card(self, hub, client, name: str) -> None:
        push_part(client, PARTS["tokenizer"], name)
        assert "pipeline_tag" not in card_of(hub, name)
        client.run("causal_lm().push_to_hub(name)", name=name)
        assert "pipeline_tag: text-generation" in card_of(hub, name)

    def test_a_push_renews_our_text_and_keeps_their_metadata(self, hub, client, name: str) -> None:
        client.run("causal_lm().push_to_hub(name, tags=['first'])", name=name)
        card = ModelCard(card_of(hub, name))
        card.data["license"] = "mit"
        edit_card(hub, name, str(card))
        client.run("causal_lm(hidden_size=13).push_to_hub(name, tags=['second'])", name=name)
        card = ModelCard(card_of(hub, name))
        assert "13 units wide" in card.text
        assert (card.data.license, card.data.tags) == ("mit", ["lstm", "first", "second"])

    def test_a_push_leaves_their_text(self, hub, client, name: str) -> None:
        client.run("causal_lm().push_to_hub(name)", name=name)
        edited = card_of(hub, name).replace("\n## How to use", "\nA word of mine.\n\n## How to use")
        edit_card(hub, name, edited)
        client.run("causal_lm(hidden_size=13).push_to_hub(name)", name=name)
        assert card_of(hub, name) == edited
        client.run("causal_lm(hidden_size=13).push_to_hub(name, extra_files={'README.md': b'# Mine\\n'})", name=name)
        assert card_of(hub, name) == "# Mine\n", "an explicit card is what the user wants"
