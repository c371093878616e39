"""Checkpoint files: what is written reads back, also by others; what is damaged is named, with a remedy."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_state_dict_from_file
from safetensors.torch import load_file
from torch import Tensor

from tlstm.checkpoint.files import (
    CheckpointError,
    index_name,
    is_weights_file,
    open_checkpoint,
    read_consistently,
    replace_files,
    save_checkpoint,
)


def load(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    with read_consistently(folder, lambda view: open_checkpoint(view, variant)) as stored:
        return {name: stored.tensor(name).clone() for name in stored.headers}


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(13, 7, generator=generator),
        "rnn.weight": torch.randn(7, 13, generator=generator, dtype=torch.float64),
        "rnn.bias": torch.randn(65, generator=generator).to(torch.bfloat16),
        "half": torch.randn(3, 5, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "steps": torch.arange(5),
        "mask": torch.tensor([True, False]),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


class TestRoundTrip:
    @pytest.mark.parametrize("variant", [None, "fp16", "ema-2"])
    @pytest.mark.parametrize("size", ["5GB", "1KB", 400, 1])
    def test_what_was_saved_is_read(self, tmp_path: Path, size: int | str, variant: str | None) -> None:
        tensors = some_tensors()
        save_checkpoint(tmp_path / "a" / "b", tensors, {"config.json": b"{}"}, max_shard_size=size, variant=variant)
        assert_same(load(tmp_path / "a" / "b", variant), tensors)

    def test_one_file_is_an_ordinary_safetensors_file(self, tmp_path: Path) -> None:
        tensors = some_tensors()
        save_checkpoint(tmp_path, tensors, metadata={"step": "7"})
        assert os.listdir(tmp_path) == ["model.safetensors"]
        assert_same(load_file(tmp_path / "model.safetensors"), tensors)
        content = (tmp_path / "model.safetensors").read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        assert header["__metadata__"] == {"format": "pt", "step": "7"}

    def test_shards_are_what_huggingface_hub_expects(self, tmp_path: Path) -> None:
        tensors = some_tensors()
        save_checkpoint(tmp_path, tensors, max_shard_size=400)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert list(index["weight_map"]) == sorted(tensors)
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 2
        assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        found: dict[str, Tensor] = {}
        for shard in shards:
            part = load_state_dict_from_file(tmp_path / shard)
            assert sum(t.nbytes for t in part.values()) <= 400 or len(part) == 1
            found |= part
        assert_same(found, tensors)

    @pytest.mark.parametrize("variant", ["fp16", "ema-2"])
    def test_variants_are_named_as_transformers_names_them(self, tmp_path: Path, variant: str) -> None:
        save_checkpoint(tmp_path, some_tensors(), variant=variant)
        reason = "the names are compared with those that transformers gives"
        named = pytest.importorskip("transformers.modeling_utils", reason=reason, exc_type=ImportError)._add_variant
        single = named("model.safetensors", variant)
        assert os.listdir(tmp_path) == [single]
        save_checkpoint(tmp_path, some_tensors(), variant=variant, max_shard_size=600)
        stem = single.removesuffix(".safetensors")
        shards = [f"{stem}-{i:05d}-of-00002.safetensors" for i in (1, 2)]
        assert sorted(os.listdir(tmp_path)) == sorted([*shards, named("model.safetensors.index.json", variant)])

    def test_a_model_without_weights(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, {})
        assert load(tmp_path) == {}

    def test_views_and_shared_memory_are_stored_apart(self, tmp_path: Path) -> None:
        flat = torch.arange(24.0)
        tensors = {"a": flat[:12].view(3, 4).t(), "b": flat[12:], "c": flat, "same as c": flat}
        for size in ("5GB", 60):
            save_checkpoint(tmp_path, tensors, max_shard_size=size)
            assert_same(load(tmp_path), tensors)
        assert (tmp_path / index_name()).exists()

    def test_files_are_as_readable_as_others_made_here(self, tmp_path: Path) -> None:
        (tmp_path / "ordinary").write_bytes(b"")
        save_checkpoint(tmp_path, some_tensors(), {"config.json": b"{}"})
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        assert len(set(modes.values())) == 1, modes


class TestReplacing:
    def test_shards_over_single_and_back_never_show_stale_weights(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "model.ckpt").write_text("mine too")
        (tmp_path / "runs").mkdir()
        for generation, size in enumerate(["5GB", 400, "5GB", 100, 400, "5GB"]):
            tensors = some_tensors(generation)
            save_checkpoint(tmp_path, tensors, {"config.json": str(generation).encode()}, max_shard_size=size)
            assert_same(load(tmp_path), tensors)
            weights = {name for name in os.listdir(tmp_path) if is_weights_file(name)}
            assert (weights == {"model.safetensors"}) == (size == "5GB")
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert sorted(os.listdir(tmp_path)) == [
            "config.json", "model.ckpt", "model.safetensors", "notes.txt", "runs"
        ]  # fmt: skip

    def test_a_variant_leaves_the_others_alone(self, tmp_path: Path) -> None:
        plain, half, other = some_tensors(1), some_tensors(2), some_tensors(3)
        save_checkpoint(tmp_path, plain, max_shard_size=400)
        save_checkpoint(tmp_path, half, variant="fp16", max_shard_size=400)
        save_checkpoint(tmp_path, other, variant="ema")
        assert_same(load(tmp_path), plain)
        save_checkpoint(tmp_path, half, variant="fp16")
        save_checkpoint(tmp_path, plain)
        assert sorted(os.listdir(tmp_path)) == ["model.ema.safetensors", "model.fp16.safetensors", "model.safetensors"]
        assert_same(load(tmp_path, "fp16"), half)
        assert_same(load(tmp_path, "ema"), other)

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name what is synced; Linux only")
    def test_every_file_is_on_disk_before_the_commit_and_the_moves_before_it_is_forgotten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_checkpoint(tmp_path, some_tensors())
        log: list[tuple[str, str]] = []
        fsync, replace, unlink = os.fsync, os.replace, os.unlink

        def record(kind: str, path: object) -> None:
            name = os.path.relpath(os.fspath(path), tmp_path)
            log.append((kind, name.split("/", 1)[-1] if name.startswith(".tlstm-save-") and "/" in name else name))

        def logged_fsync(descriptor: int) -> None:
            record("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def logged_replace(source: Path, target: Path) -> None:
            replace(source, target)
            record("move", target)

        def logged_unlink(path: Path, **kwargs) -> None:
            unlink(path, **kwargs)
            record("remove", path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", logged_fsync)
            patch.setattr(os, "replace", logged_replace)
            patch.setattr(os, "unlink", logged_unlink)
            save_checkpoint(tmp_path, some_tensors(), {"config.json": b"{}", "a.txt": b""}, max_shard_size=700)
        shards = sorted(name for name in os.listdir(tmp_path) if name.startswith("model-"))
        assert len(shards) == 2
        commit, forgotten = log.index(("move", ".tlstm-commit.json")), log.index(("remove", ".tlstm-commit.json"))
        before = log[:commit]
        for name in (*shards, "model.safetensors.index.json", "config.json", "a.txt", ".tlstm-commit.json"):
            assert ("fsync", name) in before
        assert before[-1][1].startswith(".tlstm-save-"), "the staging folder's own entries come last"
        assert log[commit + 1] == ("fsync", ".")
        moves = [name for kind, name in log[commit + 1 :] if kind == "move"]
        assert moves == [*shards, "model.safetensors.index.json", "a.txt", "config.json"]
        assert log.index(("remove", "model.safetensors")) > log.index(("move", "config.json"))
        assert log[forgotten - 1] == ("fsync", ".")

    def test_a_folder_or_file_in_the_way_is_found_before_anything_changes(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, some_tensors(1))
        (tmp_path / "config.json").mkdir()
        (tmp_path / "figures").write_text("a file")
        for name in ("config.json", "figures/loss.png"):
            with pytest.raises(OSError, match=r"stands where a f.*unchanged"):
                save_checkpoint(tmp_path, some_tensors(2), {name: b"{}"})
        assert_same(load(tmp_path), some_tensors(1))
        with pytest.raises(NotADirectoryError, match=r"expected a folder.*got a file.*figures"):
            save_checkpoint(tmp_path / "figures", {})

    def test_symbolic_links_are_replaced_and_their_targets_left_alone(self, tmp_path: Path) -> None:
        """As in a snapshot of the Hub cache, whose files are links to blobs that other snapshots share."""
        save_checkpoint(tmp_path / "blobs", some_tensors(1))
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
        assert_same(load(tmp_path / "snapshot"), some_tensors(1))
        save_checkpoint(tmp_path / "snapshot", some_tensors(2))
        assert_same(load(tmp_path / "snapshot"), some_tensors(2))
        assert_same(load(tmp_path / "blobs"), some_tensors(1))

    @pytest.mark.parametrize(
        "name", ["../x", "/etc/x", "a/../x", "", "a//b", "a/", "./a", ".tlstm-commit.json", "a\\b", "C:x", "x\0"]
    )
    def test_names_outside_the_folder_are_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="expected a path inside the folder"):
            replace_files(tmp_path / "new", {name: b""})
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("size", [0, -1, "5", "5 apples", "GB", 1.5, True, None])
    def test_shard_sizes_that_make_no_sense(self, tmp_path: Path, size: object) -> None:
        with pytest.raises(ValueError, match="max_shard_size: expected"):
            save_checkpoint(tmp_path, some_tensors(), max_shard_size=size)

    @pytest.mark.parametrize("variant", ["", "a/b", "..", "a.b", 7])
    def test_variants_that_make_no_sense(self, tmp_path: Path, variant: object) -> None:
        with pytest.raises(ValueError, match="variant: expected"):
            save_checkpoint(tmp_path, some_tensors(), variant=variant)

    def test_companions_may_not_pose_as_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="name of a weights file"):
            save_checkpoint(tmp_path, {}, {"model-00001-of-00002.safetensors": b""})


def test_names_of_weights_files() -> None:
    ours = ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    assert all(is_weights_file(name) for name in ours)
    halves = ["model.fp16.safetensors", "model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"]
    assert all(is_weights_file(name, "fp16") for name in halves)
    others = ["model.bin", "model-1-of-2.safetensors", "my-model.safetensors", "config.json", "xmodel.safetensors"]
    assert not any(is_weights_file(name) for name in others + halves)
    assert not any(is_weights_file(name, "fp16") for name in others + ours)


def test_a_folder_that_never_rests_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlstm.checkpoint.folder_view.time.sleep", lambda seconds: None)
    count = 0

    def read(view):
        nonlocal count
        view.read_bytes("a")
        count += 1
        replace_files(tmp_path, {"a": str(count).encode()})

    replace_files(tmp_path, {"a": b"0"})
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with pytest.raises(CheckpointError, match="kept changing"):
        read_consistently(tmp_path, read)
    assert count > 10
