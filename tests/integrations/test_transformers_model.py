"""Models in transformers against the same ones in tlstm: files both ways, logits to the bit, loss, errors."""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import assert_same_model, causal_lm, rewrite
from transformers import AutoConfig, AutoModelForCausalLM

from tlstm import LSTMForCausalLM
from tlstm.integrations.transformers import CACHE, LSTMCache, LSTMConfig
from tlstm.transformers_shim import AUTO_MAP

KINDS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "eos_token_id": [3, 5], "bos_token_id": 1, "pad_token_id": 0},
    "widths": {"layer_sizes": [7, 9], "embedding_size": 5, "output_projection": True, "bias": False, "residual": True},
    "projected": {"proj_size": 3, "head_bias": False},
    "heads": {"hidden_size": 10, "num_heads": 2, "recompute": True},
    "orthogonal": {"initializer": "orthogonal", "forget_bias": 1.0, "weight_dropout": 0.5, "hidden_dropout": 0.3},
}


@pytest.fixture(params=KINDS)
def kind(request) -> dict:
    return KINDS[request.param]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 13, (3, 11))


@pytest.fixture(autouse=True)
def no_unknown_settings():
    """Nothing that either library writes is strange to the other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown settings")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_logits_to_the_bit(kind, dtype, ids, tmp_path):
    own = causal_lm(1, **kind).to(dtype)
    own.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == dtype
    assert not model.training
    assert_same_model(model, own)
    assert torch.equal(model(ids).logits, own(ids).logits)
    mask = torch.arange(11) >= torch.tensor([[4], [0], [9]])  # padded on the left
    assert torch.equal(model(ids, attention_mask=mask.long()).logits, own(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("shard_size", ["5GB", 700])
def test_what_transformers_saves_tlstm_loads(kind, shard_size, ids, tmp_path):
    own = causal_lm(1, **kind)
    own.save_pretrained(tmp_path / "own", max_shard_size=shard_size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard_size == 700)
    back = LSTMForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_same_model(back, own)
    assert torch.equal(back(ids).logits, own(ids).logits)
    for config, expected in ((back.config, own.config), (back.generation_config, own.generation_config)):
        assert set(config.extra) == {"transformers_version"}
        config.extra, expected.architectures = {}, ["LSTMForCausalLM"]
        assert config == expected


def test_the_config_is_that_of_tlstm(kind, tmp_path):
    own = causal_lm(**kind).config
    own.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LSTMConfig)
    assert config.to_tlstm() == own
    assert config.num_hidden_layers == own.num_layers
    changed = AutoConfig.from_pretrained(tmp_path, weight_dropout=0.25)
    assert AutoModelForCausalLM.from_config(changed).model.layers[1].weight_dropout == 0.25


@pytest.mark.parametrize("change", [{"hidden_size": 0}, {"residual": 1}, {"config_version": 99}, {"vocab_size": ...}])
def test_a_wrong_setting_is_named(change, tmp_path):
    causal_lm().config.save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        AutoConfig.from_pretrained(tmp_path)


def test_a_fresh_model_is_the_one_that_tlstm_draws(kind):
    config = LSTMConfig(**{"vocab_size": 13, "hidden_size": 7, **kind})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    assert_same_model(model, LSTMForCausalLM(config.to_tlstm()))
    half = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_missing_weights_are_drawn_and_the_rest_is_kept(tmp_path):
    own = causal_lm(initializer="orthogonal", forget_bias=1.0)
    own.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = ["model.layers.1.weight_hh_l0", "model.layers.1.bias_ih_l0", "lm_head.weight"]
    save_file({k: v for k, v in weights.items() if k not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["missing_keys"]) == sorted(gone)
    found = model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights if name not in gone)
    for gate in found[gone[0]].chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(7))
    assert torch.equal(found[gone[1]], torch.eye(4)[1].repeat_interleave(7))
    assert 0.05 < found[gone[2]].abs().max() <= 0.1


def test_the_state_goes_on_as_in_tlstm(own, theirs):
    ids = torch.randint(0, 65, (3, 11))
    first, own_first = theirs(ids[:, :4]), own(ids[:, :4])
    cache = first[CACHE]
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (4, 3, 2)
    second, own_second = theirs(ids[:, 4:], **{CACHE: cache}), own(ids[:, 4:], state=own_first.state)
    assert torch.equal(second.logits, own_second.logits)
    assert second[CACHE] is cache
    assert cache.get_seq_length() == 11
    assert all(map(torch.equal, cache.state.h + cache.state.c, own_second.state.h + own_second.state.c))
    assert CACHE not in theirs.train()(ids)
    assert theirs(ids, use_cache=True)[CACHE].state.h[0].requires_grad


def test_the_caches_older_name_is_understood_by_every_version(theirs):
    ids = torch.randint(0, 65, (3, 11))
    cache = theirs(ids[:, :4])[CACHE]
    assert theirs(ids[:, 4:], past_key_values=cache)[CACHE] is cache
    assert cache.get_seq_length() == 11
    with pytest.raises(ValueError, match="expected one cache"):
        theirs(ids, cache=cache, past_key_values=cache)


def test_logits_to_keep(theirs):
    ids = torch.randint(0, 65, (3, 11))
    full = theirs(ids).logits
    torch.testing.assert_close(theirs(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(theirs(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    assert theirs(ids, labels=ids, logits_to_keep=1).logits.shape == full.shape


def test_the_loss_is_that_of_tlstm(own, theirs):
    ids = torch.randint(0, 65, (3, 11))
    labels = ids.masked_fill(torch.rand(3, 11) < 0.2, -100)
    mask = (torch.arange(11) < torch.tensor([[7], [11], [2]])).long()
    for options in ({}, {"attention_mask": mask}):
        expected = own(ids, labels=labels, **options).loss
        output = theirs(ids, labels=labels, **options)
        assert torch.equal(output.loss, expected)
        kept = labels[:, 1:] != -100
        if options:
            kept &= mask[:, 1:].bool()
        scaled = theirs(ids, labels=labels, num_items_in_batch=5, **options).loss
        torch.testing.assert_close(scaled, expected * kept.sum() / 5)
    loss, _, cache = theirs(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, own(ids, labels=labels).loss)
    assert isinstance(cache, LSTMCache)


def test_resized_embeddings(own, theirs, tmp_path):
    theirs.resize_token_embeddings(70)
    theirs.save_pretrained(tmp_path / "wide")
    wide = LSTMForCausalLM.from_pretrained(tmp_path / "wide")
    assert wide.config.vocab_size == theirs.model.config.vocab_size == 70
    ids = torch.randint(0, 65, (2, 5))
    torch.testing.assert_close(wide(ids).logits[..., :65], own(ids).logits)
    assert torch.equal(wide(ids).logits, theirs(ids).logits)


def test_what_is_not_offered_is_refused(theirs):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected an LSTMCache, received DynamicCache"):
        theirs(ids, **{CACHE: transformers.DynamicCache()})
    with pytest.raises(ValueError, match=r"output_hidden_states: .* leave it out"):
        theirs(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"inputs_embeds: .* leave it out"):
        theirs(ids, inputs_embeds=torch.zeros(1, 3, 23))
    cache = theirs(ids)[CACHE]
    cache.crop(0)
    with pytest.raises(ValueError, match="deepcopy"):
        cache.crop(1)
    with pytest.raises(ValueError, match="expected 2 streams"):
        theirs(ids.repeat(2, 1), **{CACHE: cache})


def test_the_shim_stays_with_its_checkpoint(own, tmp_path):
    """Written on request, then by every save of either library, so that `config.json` never names a missing file."""
    line = "from tlstm.integrations.transformers import LSTMConfig, LSTMForCausalLM\n"
    own.save_pretrained(tmp_path / "0", transformers_shim=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "0").save_pretrained(tmp_path / "1")
    LSTMForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    for folder in "012":
        assert (tmp_path / folder / "modeling_tlstm.py").read_text() == line
        assert json.loads((tmp_path / folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    own.save_pretrained(tmp_path / "without")
    AutoModelForCausalLM.from_pretrained(tmp_path / "without").save_pretrained(tmp_path / "without either")
    for folder in ("without", "without either"):
        assert not (tmp_path / folder / "modeling_tlstm.py").exists()
        assert "auto_map" not in (tmp_path / folder / "config.json").read_text()


def test_an_installation_without_transformers_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "tlstm.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5 or newer .*pip install 'tlstm\[transformers\]'"):
        importlib.import_module("tlstm.integrations.transformers")


def test_the_bridge_names_what_tlstm_names(own, theirs):
    """`architectures` and the weights of a checkpoint are the same whoever saved it."""
    assert type(theirs).__name__ == type(own).__name__ == "LSTMForCausalLM"
    assert [name for name, _ in theirs.named_children()] == [name for name, _ in own.named_children()]
