"""transformers as a second client of what tlstm pushed, and tlstm of what transformers pushed, on a loopback Hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.client import Client
from hub.loopback import LoopbackHub
from small_models import assert_same_model, causal_lm

from tlstm import LSTMForCausalLM, Tokenizer
from tlstm.transformers_shim import AUTO_MAP, SHIM

pytest.importorskip("transformers")

SETUP = """
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

def push(name, seed=0, **options):
    tokenizer = Tokenizer.bytes()
    model = causal_lm(seed, vocab_size=tokenizer.vocab_size)
    model.push_to_hub(name, tokenizer=tokenizer, **options)
    return model, tokenizer
"""


@pytest.fixture(scope="module")
def fresh(server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process of this file's own: the first test needs one that has not imported the bridge."""
    client = Client(server.url, tmp_path_factory.mktemp("transformers"), HF_HUB_DISABLE_XET="1")
    client.run(SETUP)
    yield client
    client.close()


@pytest.fixture
def client(hub: LoopbackHub, fresh: Client) -> Client:
    hub.lfs_suffixes = (".safetensors",)
    return fresh


def test_with_remote_code_and_without_an_import(hub, client, name):
    result = client.run(
        """
        import sys
        own, tokenizer = push(name, transformers_shim=True)
        assert "tlstm.integrations.transformers" not in sys.modules
        config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        ids = AutoTokenizer.from_pretrained(name)("to be", return_tensors="pt").input_ids
        assert ids[0].tolist() == tokenizer("to be").input_ids.flatten().tolist()
        assert torch.equal(model(ids).logits, own(ids).logits)
        model.push_to_hub(name + "-again")
        again = AutoModelForCausalLM.from_pretrained(name + "-again", trust_remote_code=True)
        result = [type(config).__module__, digest(own), digest(model), digest(again)]
        """,
        name=name,
    )
    assert result[0] == "tlstm.integrations.transformers"
    assert len(set(result[1:])) == 1
    for repo in (name, f"{name}-again"):
        assert hub.repos[repo].find("main").files["modeling_tlstm.py"].content == SHIM


def test_both_ways_after_the_import(hub, client, name):
    """A branch, shards, and the tokenizer: each library loads what the other one pushed."""
    digests = client.run(
        """
        import tlstm.integrations.transformers
        models = {"main": push(name)[0], "dev": push(name, 1, revision="dev", max_shard_size=700)[0]}
        theirs = {branch: AutoModelForCausalLM.from_pretrained(name, revision=branch) for branch in models}
        theirs["dev"].push_to_hub(name + "-again", max_shard_size="1KB")
        AutoTokenizer.from_pretrained(name).push_to_hub(name + "-again")
        back = LSTMForCausalLM.from_pretrained(name + "-again")
        assert Tokenizer.from_pretrained(name + "-again")("to be").input_ids.tolist() == (
            Tokenizer.from_pretrained(name)("to be").input_ids.tolist()
        )
        assert AutoConfig.from_pretrained(name).to_tlstm() == LSTMForCausalLM.from_pretrained(name).config
        result = [[digest(models[branch]), digest(theirs[branch])] for branch in models] + [[digest(back)]]
        """,
        name=name,
    )
    (main, their_main), (dev, their_dev), (back,) = digests
    assert main == their_main != dev == their_dev == back
    assert "model.safetensors.index.json" in hub.repos[f"{name}-again"].names()


def test_the_pipeline_reads_from_the_hub(client, name):
    result = client.run(
        """
        own, tokenizer = push(name, transformers_shim=True)
        writer = transformers.pipeline("text-generation", model=name, trust_remote_code=True, device="cpu")
        text = writer("to be", max_new_tokens=9, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
        ids = own.generate(tokenizer("to be").input_ids, max_new_tokens=9)[0]
        result = [list(map(int, text)), ids.tolist()]
        """,
        name=name,
    )
    assert result[0] == result[1]


def test_commands_add_the_shim_and_keep_it(hub, client, name, tmp_path: Path):
    """`tlstm push --transformers-shim`, `tlstm pull`, which takes no code from the Hub, and `tlstm push` again."""
    model = causal_lm(vocab_size=Tokenizer.bytes().vocab_size)
    model.save_pretrained(tmp_path / "made", tokenizer=Tokenizer.bytes())

    def tlstm(*arguments: object) -> tuple[int, str, str]:
        return client.run("result = tlstm_command(*arguments)", arguments=list(map(str, arguments)))

    assert tlstm("push", tmp_path / "made", name, "--transformers-shim")[0] == 0
    repo = hub.repos[name]
    files = repo.find("main").files
    assert json.loads(files["config.json"].content)["auto_map"] == AUTO_MAP
    assert files["modeling_tlstm.py"].content == SHIM
    assert "auto_map" not in (tmp_path / "made" / "config.json").read_text()

    changed = {**files, "modeling_tlstm.py": dataclasses.replace(files["config.json"], content=b"print()\n")}
    repo.refs["refs/heads/main"] = repo.add_commit("another file", "", changed, repo.head).oid
    code, _, err = tlstm("pull", name, tmp_path / "pulled")
    assert code == 0
    assert "unknown settings" not in err
    assert (tmp_path / "pulled" / "modeling_tlstm.py").read_bytes() == SHIM
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), model)
    assert tlstm("push", tmp_path / "pulled", name)[0] == 0
    assert repo.find("main").files["modeling_tlstm.py"].content == SHIM
