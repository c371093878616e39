"""Damaged, hostile or contradictory checkpoint files: each an error that names the file and the remedy."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tlstm.checkpoint.files import (
    CheckpointError,
    CheckpointNotFoundError,
    index_name,
    open_checkpoint,
    read_consistently,
    save_checkpoint,
    weights_name,
)


def load(folder: Path) -> dict[str, Tensor]:
    with read_consistently(folder, open_checkpoint) as stored:
        return {name: stored.tensor(name).clone() for name in stored.headers}


GARBAGE = bytes(range(256)) * 8
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def damaged(whole: bytes, how: str) -> bytes:
    return {
        "empty": b"",
        "seven bytes": whole[:7],
        "cut in the header": whole[:60],
        "cut in the data": whole[:-1],
        "too long": whole + b"\0",
        "garbage": GARBAGE,
        "lfs pointer": LFS,
        "web page": b"<!DOCTYPE html><html>Sign in</html>",
        "pickle": pickle.dumps({"a": 1}),
        "zip pickle": b"PK\x03\x04" + GARBAGE,
        "header of terabytes": struct.pack("<Q", 1 << 42) + whole[8:],
        "header beyond 64 bits": b"\xff" * 8 + whole[8:],
        "header is no JSON": whole[:8] + b"{" * 200 + whole[208:],
        "tensor of terabytes": with_header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        "overlapping tensors": with_header(
            {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}, b"\0" * 4
        ),
        "unknown dtype": with_header({"a": {"dtype": "F12", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        "8-bit floats": with_header({"a": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4),
    }[how]


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


REMEDIES = {
    "empty": "is empty; download or save it again",
    "seven bytes": "truncated: 7 of",
    "cut in the header": "truncated: 60 of",
    "cut in the data": "truncated",
    "garbage": "header of .* bytes in a file of 2048",
    "lfs pointer": "run `git lfs pull`",
    "web page": "web page.*download it again",
    "pickle": "pickle.*convert it",
    "zip pickle": "pickle.*convert it",
    "header of terabytes": "header of 4398046511104 bytes",
    "header beyond 64 bits": "header of .* bytes",
    "tensor of terabytes": r"truncated: \d+ of 43980465111\d\d",
    "8-bit floats": "'a' is stored as F8_E5M2; expected one of F64",
}


class TestDamage:
    @pytest.mark.parametrize(
        "how",
        [
            *REMEDIES,
            "too long",
            "unknown dtype",
            "header is no JSON",
            "overlapping tensors",
        ],
    )
    @pytest.mark.parametrize("form", ["single", "shard"])
    def test_a_damaged_file_is_named_with_a_remedy(self, tmp_path: Path, how: str, form: str) -> None:
        tensors = {"a": torch.randn(7, 13), "b": torch.randn(65)}
        save_checkpoint(tmp_path, tensors, max_shard_size="5GB" if form == "single" else 1)
        path = tmp_path / ("model.safetensors" if form == "single" else "model-00002-of-00002.safetensors")
        path.write_bytes(damaged(path.read_bytes(), how))
        with pytest.raises(CheckpointError, match=REMEDIES.get(how, "download or save it again")) as caught:
            load(tmp_path)
        assert str(path) in str(caught.value)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_flipped_bytes_give_tensors_or_a_named_error(self, tmp_path_factory, data: st.DataObject) -> None:
        folder = tmp_path_factory.mktemp("flipped")
        save_file({"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.int64)}, folder / "model.safetensors")
        content = bytearray((folder / "model.safetensors").read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
        (folder / "model.safetensors").write_bytes(content)
        caught, found = None, {}
        try:
            found = load(folder)
        except CheckpointError as error:
            caught = error
        assert caught is None or str(folder / "model.safetensors") in str(caught)
        assert sum(t.nbytes for t in found.values()) <= len(content)

    @pytest.mark.parametrize(
        "name",
        [
            "../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\x.safetensors", "model.bin",
            "model.safetensors.pkl", ".hidden.safetensors", "C:x.safetensors", "", 7, None,
        ],
    )  # fmt: skip
    def test_shard_names_that_lead_elsewhere(self, tmp_path: Path, name: object) -> None:
        save_checkpoint(tmp_path / "model", {"a": torch.ones(2)})
        save_checkpoint(tmp_path, {"a": torch.ones(2)})
        (tmp_path / "model" / weights_name()).unlink()
        index = tmp_path / "model" / index_name()
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="refused the shard name") as caught:
            load(tmp_path / "model")
        assert str(index) in str(caught.value)

    def shards(self, folder: Path) -> dict:
        save_checkpoint(folder, {"a": torch.ones(2), "b": torch.ones(3)}, max_shard_size=12)
        return json.loads((folder / index_name()).read_text())

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        self.shards(tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"model-00002-of-00002.*missing.*download"):
            load(tmp_path)

    def test_index_and_shards_that_disagree(self, tmp_path: Path) -> None:
        index = self.shards(tmp_path)
        first, second = sorted(set(index["weight_map"].values()))
        for weight_map, complaint in [
            ({**index["weight_map"], "c": first}, "'c' not in the shards"),
            ({"a": first}, None),
            ({"a": first, "b": first}, "'b' not in the shards"),
            ({"a": second, "b": second}, "'a' not in the shards"),
            ({"b": second, "c": first}, "holds tensor 'a', which .* places in no file"),
            ({"a": second, "b": second, "c": first}, "holds tensor 'a', which .* places in model-00002"),
            ({}, "expected a 'weight_map'"),
            (["a"], "expected a 'weight_map'"),
        ]:
            (tmp_path / index_name()).write_text(json.dumps({"weight_map": weight_map}))
            if complaint is None:
                assert list(load(tmp_path)) == ["a"]
                continue
            with pytest.raises(CheckpointError, match=complaint):
                load(tmp_path)

    def test_a_tensor_in_two_shards(self, tmp_path: Path) -> None:
        index = self.shards(tmp_path)
        save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / index["weight_map"]["b"])
        with pytest.raises(CheckpointError, match=r"model-00002.*tensor 'a' is also in model-00001"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (b"", "is empty"),
            (LFS, "git lfs pull"),
            (b"{", "not valid JSON"),
            (b"[1]", "expected a JSON object, got list"),
            (b"\xff\xfe\x00", "not valid JSON"),
            (b'{"weight_map":' + b"[" * 200_000, "not valid JSON"),
            (b"{}", "expected a 'weight_map'"),
        ],
    )
    def test_a_damaged_index(self, tmp_path: Path, text: bytes, complaint: str) -> None:
        self.shards(tmp_path)
        (tmp_path / index_name()).write_bytes(text)
        with pytest.raises(CheckpointError, match=complaint) as caught:
            load(tmp_path)
        assert str(tmp_path / index_name()) in str(caught.value)

    def test_two_sets_of_weights_are_not_guessed_between(self, tmp_path: Path) -> None:
        """As others leave a folder when they save shards over a single file: one of the two is old."""
        self.shards(tmp_path)
        save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"both model.safetensors and .*index.json.*delete"):
            load(tmp_path)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth", "model.pkl"])
    def test_pickle_is_never_read(self, tmp_path: Path, name: str) -> None:
        class Bomb:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "exploded"),))

        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointNotFoundError, match=rf"only pickle files \('{name}'\).*torch.load.*save_file"):
            load(tmp_path)
        (tmp_path / name).rename(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="pickle file under another name"):
            load(tmp_path)
        assert not (tmp_path / "exploded").exists()

    def test_what_is_there_instead(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="found no file at all"):
            load(tmp_path)
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(CheckpointNotFoundError, match=r"found 'notes.txt'; check the folder"):
            load(tmp_path)
        save_checkpoint(tmp_path, {}, variant="fp16")
        with pytest.raises(FileNotFoundError, match=r"found 'model.fp16.safetensors'; name the one you want with `var"):
            load(tmp_path)
        with pytest.raises(CheckpointNotFoundError, match="expected a checkpoint folder, found nothing"):
            load(tmp_path / "absent")
        with pytest.raises(CheckpointNotFoundError, match="expected a checkpoint folder, found a file"):
            load(tmp_path / "notes.txt")

    @pytest.mark.parametrize(
        "text",
        [
            b"", b"{}", b"[]", b"garbage", b"[" * 100_000,
            b'{"staging": "../x", "files": [], "stale": []}',
            b'{"staging": ".tlstm-save-0123456789abcdef", "files": ["../x"], "stale": []}',
            b'{"staging": ".tlstm-save-0123456789abcdef", "files": [], "stale": ["/etc/passwd"]}',
            b'{"staging": ".tlstm-save-0123456789abcdef", "files": [7], "stale": []}',
        ],
    )  # fmt: skip
    def test_a_commit_record_that_no_save_wrote(self, tmp_path: Path, text: bytes) -> None:
        save_checkpoint(tmp_path, {"a": torch.ones(2)})
        (tmp_path / ".tlstm-commit.json").write_bytes(text)
        for use in (load, lambda folder: save_checkpoint(folder, {})):
            with pytest.raises(CheckpointError, match=r"\.tlstm-commit\.json: not a commit record.*delete"):
                use(tmp_path)
        (tmp_path / ".tlstm-commit.json").unlink()
        assert load(tmp_path)["a"].tolist() == [1, 1]
