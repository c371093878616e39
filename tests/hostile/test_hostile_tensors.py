"""Tensor files made to hurt: weights, their index, states and checkpoints of a run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.samples import READERS, RUN, TENSOR_FILES, VOCABULARY, entry, refusal, tensor_file, use_model, write_sample
from safetensors.torch import load_file, save_file
from small_models import causal_lm, rewrite

from tlstm import LSTMForCausalLM
from tlstm.checkpoint import memory
from tlstm.checkpoint.files import CheckpointError

INDEX = "model.safetensors.index.json"


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite_header(path: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """`change(header, name)` gets the name of the first tensor."""
    header, data = parts(path)
    change(header, next(name for name in header if name != "__metadata__"))
    path.write_bytes(tensor_file(header, data))


@pytest.mark.parametrize("name", TENSOR_FILES)
class TestHeaders:
    @pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
    def test_values_that_make_no_sense(self, folder: Path, name: str, field: str) -> None:
        """Wrong types, numbers beyond 64 bits, dtypes of another size, offsets outside the file or backwards."""
        sound = (folder / name).read_bytes()
        for value in (
            None, 7, "x", [], {}, True, -1, 1.5, [10**30], [-1], ["a"], [True, True], [1.5], [0, 1 << 62], [4, 0],
            [1 << 63, 1 << 63], [1 << 40, 1 << 40], "F8_E5M2", "F4", "U16", "C64", "F64", "BOOL",
        ):  # fmt: skip
            (folder / name).write_bytes(sound)
            rewrite_header(folder / name, lambda header, first, value=value: header[first].update({field: value}))
            refusal(folder, name)

    def test_a_header_of_terabytes(self, folder: Path, name: str) -> None:
        path = folder / name
        path.write_bytes(struct.pack("<Q", 1 << 42) + path.read_bytes()[8:])
        refusal(folder, name)
        with path.open("ab") as file:  # and a sparse file that seems to hold it
            file.truncate(1 << 43)
        refusal(folder, name)

    def test_a_tensor_twice(self, folder: Path, name: str) -> None:
        """A reader takes the first or the last: two programs would see two models."""
        header, data = parts(folder / name)
        first = next(key for key in header if key != "__metadata__")
        text = json.dumps(header).encode()
        other = json.dumps({first: entry("F32", [1], 0, 4)}).encode()
        (folder / name).write_bytes(tensor_file(other[:-1] + b", " + text[1:], data))
        refusal(folder, name, f"the key '{first}' stands twice")

    def test_tensors_that_overlap_or_leave_a_hole(self, folder: Path, name: str) -> None:
        for change in (
            lambda header, first: header.update(thief=dict(header[first])),
            lambda header, first: header.update(thief=entry("F32", [1], 0, 4)),
            lambda header, first: header.pop(first),
        ):
            sound = (folder / name).read_bytes()
            rewrite_header(folder / name, change)
            refusal(folder, name)
            (folder / name).write_bytes(sound)

    def test_names_that_upset_a_terminal_or_fill_it(self, folder: Path, name: str) -> None:
        sound = (folder / name).read_bytes()
        for bad in ("\x1b]0;owned\x07", "a\0b", "x" * 10_000, "a\nb", "\u202e"):
            rewrite_header(folder / name, lambda header, first, bad=bad: header.update({bad: entry("F32", [0], 0, 0)}))
            assert "\x1b" not in refusal(folder, name, "refused the tensor name")
            (folder / name).write_bytes(sound)

    def test_json_that_is_none(self, folder: Path, name: str) -> None:
        for text in (b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b"\xff", b"", b"NaN", b'{"a":{"dtype":NaN}}'):
            (folder / name).write_bytes(tensor_file(text))
            refusal(folder, name)

    def test_pickle_under_this_name(self, folder: Path, name: str) -> None:
        class Bomb:
            def __reduce__(self):
                return (os.mkdir, (str(folder / "exploded"),))

        (folder / name).write_bytes(pickle.dumps(Bomb()))
        refusal(folder, name)
        torch.save({"w": torch.ones(3)}, folder / name)
        refusal(folder, name)
        assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "count"),
    [("model.safetensors", 66_000), *(pytest.param(name, 10**6, marks=pytest.mark.slow) for name in TENSOR_FILES)],
)
def test_a_million_tensors(folder: Path, name: str, count: int) -> None:
    """The library takes a minute to list a million."""
    header = {f"t{number}": entry("F32", [0], 0, 0) for number in range(count)}
    (folder / name).write_bytes(tensor_file(header))
    refusal(folder, name, f"lists {count} tensors; expected at most 65536")


class TestIndex:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_sample(tmp_path / "checkpoint", max_shard_size=2000)
        assert (tmp_path / "checkpoint" / INDEX).exists()
        return tmp_path / "checkpoint"

    @pytest.fixture(autouse=True)
    def reader(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(READERS, INDEX, use_model)

    @pytest.mark.parametrize(
        "shard",
        [
            "../../secret.safetensors", "/etc/secret.safetensors", "a/../model.safetensors", "x\0.safetensors",
            "x" * 10**6 + ".safetensors", "x" * 255 + ".safetensors", "\ud800.safetensors", "\x1b[2J.safetensors",
            "..\\secret.safetensors", "C:secret.safetensors", ".safetensors", "pytorch_model.bin", "", " ", None, 7,
            ["a.safetensors"], {"a": "b"}, True,
        ],
        ids=lambda shard: repr(shard)[:30],
    )  # fmt: skip
    def test_shard_names_that_lead_elsewhere(self, folder: Path, shard: object) -> None:
        save_file({"a": torch.ones(2)}, folder.parent / "secret.safetensors")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.bias"] = shard
        (folder / INDEX).write_text(json.dumps(index))
        refusal(folder, INDEX, "refused the shard name|surrogates not allowed")

    def test_a_hundred_thousand_tensors_or_shards(self, folder: Path) -> None:
        for shard in ("model-00001-of-00002.safetensors", "{}.safetensors"):
            weight_map = {f"t{number}": shard.format(number) for number in range(100_000)}
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
            refusal(folder, INDEX, "lists 100000 tensors")

    def test_a_tensor_twice(self, folder: Path) -> None:
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.bias": "b.safetensors",'))
        refusal(folder, INDEX, r"the key 'lm_head\.bias' stands twice")

    @pytest.mark.parametrize("target", ["missing", "loop", "/dev/zero", "folder"])
    def test_links_that_end_nowhere_good(self, folder: Path, target: str) -> None:
        """Links as such are how the Hub's cache is built; they lead to files in the right format, or are refused."""
        shard = sorted(folder.glob("model-*.safetensors"))[-1]
        elsewhere = folder.parent / "blob"
        shard.rename(elsewhere)
        shard.symlink_to(elsewhere)
        use_model(folder)
        (folder.parent / "folder").mkdir()
        shard.unlink()
        shard.symlink_to(shard if target == "loop" else folder.parent / target)
        with pytest.raises((ValueError, OSError)) as caught:
            use_model(folder)
        assert str(shard) in str(caught.value)


class TestSizes:
    def test_a_config_of_terabytes_over_a_small_file(self, folder: Path) -> None:
        rewrite(folder / "config.json", hidden_size=1 << 17, num_layers=1024, vocab_size=1 << 26)
        refusal(folder, "model.safetensors", "do not fit LSTMForCausalLM")
        with pytest.raises(CheckpointError, match=r"tensors need [\d,]+\.\d GB, and this machine has") as caught:
            LSTMForCausalLM.from_pretrained(folder, strict=False)
        assert str(folder / "model.safetensors") in str(caught.value)

    def test_terabytes_of_nothing(self, tmp_path: Path) -> None:
        """A sparse file whose header, size and config agree: only the machine's memory speaks against it."""
        vocabulary, width = 1 << 26, 1 << 14
        model = causal_lm(vocab_size=VOCABULARY, hidden_size=1, num_layers=1, proj_size=0, embedding_size=1)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        shapes |= {"model.embedding.weight": [vocabulary, width], "model.layers.0.weight_ih_l0": [4, width]}
        shapes |= {"lm_head.weight": [vocabulary, 1], "lm_head.bias": [vocabulary]}
        rewrite(tmp_path / "config.json", vocab_size=vocabulary, embedding_size=width)
        header, end = {}, 0
        for name, shape in shapes.items():
            size = 4 * torch.Size(shape).numel()
            header[name] = entry("F32", shape, end, end + size)
            end += size
        path = tmp_path / "model.safetensors"
        path.write_bytes(tensor_file(header))
        try:
            os.truncate(path, path.stat().st_size + end)
        except OSError as error:
            pytest.skip(f"this file system makes no sparse file of {end / 1e12:.0f} TB ({error})")
        refusal(tmp_path, "model.safetensors", "GB of memory|os error 12|not valid safetensors")

    def test_the_memory_of_a_machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        found = memory.total_memory()
        assert found is not None
        assert found > 1 << 28
        memory.check_fits(found, "model")
        with pytest.raises(CheckpointError, match=r"model: its tensors need"):
            memory.check_fits(found + 1, "model")
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")  # as on a Mac: without swap
        assert 1 << 28 < memory.total_memory() <= found


class TestStates:
    GENERATION = "generation.safetensors"

    def test_metadata_of_a_generation_state(self, folder: Path) -> None:
        path = folder / self.GENERATION
        header, data = parts(path)
        sound = json.loads(header["__metadata__"]["generation"])
        wrong = {
            "vocab_size": [None, "7", 10**400, 0, -1, True, 2.5, [], ...],
            "seeds": ["ab", {"a": 1}, [1], [1, 2.5], [True, False], [-1, 1], [1 << 64, 1], 7, [[1], [2]], ...],
            "return_index": ["ab", [1], [1, -1], [1 << 32, 0], [1.5, 2], {"0": 1, "1": 1}, [True, True], 7, None, ...],
        }
        texts = ["", "[", "[]", "null", "[" * 100_000, '{"vocab_size": NaN}', "9" * 5000, "\ud800"]
        for name, values in wrong.items():
            for value in values:
                about = {key: kept for key, kept in (sound | {name: value}).items() if kept is not ...}
                texts.append(json.dumps(about))
        for text in texts:
            header["__metadata__"]["generation"] = text
            path.write_bytes(tensor_file(header, data))
            refusal(folder, self.GENERATION)

    @pytest.mark.parametrize("name", [GENERATION, "lstm.safetensors"])
    def test_tensors_of_other_kinds_and_names(self, folder: Path, name: str) -> None:
        path = folder / name
        metadata = parts(path)[0]["__metadata__"]
        sound = load_file(path)
        first = next(key for key in sound if key.endswith("h.0"))
        for change in (
            {first: sound[first].to(torch.int64)}, {first: sound[first].bool()}, {first: sound[first][0]},
            {first: sound[first][:1]}, {first: sound[first][:0]}, {"more": torch.ones(2)}, {first: None},
        ):  # fmt: skip
            tensors = {key: value for key, value in (sound | change).items() if value is not None}
            save_file(tensors, path, metadata)
            refusal(folder, name)

    def test_groups_of_a_run_lead_nowhere(self, folder: Path) -> None:
        save_file({"a": torch.ones(2)}, folder / "secret.safetensors")
        for groups in (["../secret"], ["/etc/passwd"], ["a\0b"], [7], "model", None, {"model": 1}, ["absent"], ...):
            rewrite(folder / RUN / "trainer.json", groups=groups)
            with pytest.raises(ValueError, match="resume from an earlier checkpoint") as caught:
                READERS[f"{RUN}/trainer.json"](folder)
            assert str(folder / RUN) in str(caught.value)
