"""The commands that measure the host's part of a call: every case has its figures, the CSV holds what they are of."""

from __future__ import annotations

import csv
import sys

import pytest

pytest.importorskip("triton", reason="what the host does for the kernels needs triton")

from benchmarks import decode_host, host_figures, layer_host


def test_tokens_of_the_decode_kernel(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode_host, "STEPS", 30)
    monkeypatch.setattr(decode_host, "BATCHES", (1, 5))
    monkeypatch.setattr(sys, "argv", ["decode_host", "--turns", "2", "--out", str(tmp_path / "host.csv")])
    host_figures.run(decode_host.__doc__, decode_host.COLUMNS, decode_host.measure)
    with open(tmp_path / "host.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["B"]) for row in rows] == [(way, B) for B in "15" for way in ("step", "advance")]
    assert all(row["turns"] == "2" and row["commit"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_calls_of_a_layer(monkeypatch):
    monkeypatch.setattr(layer_host, "CALLS", 2)
    rows = list(layer_host.measure(3))
    assert [(row["layer"], row["mode"]) for row in rows] == [
        (layer, mode) for layer in layer_host.CASES for mode in ("forward", "train")
    ]
    assert all(float(row["p20"]) <= float(row["us"]) <= float(row["p80"]) for row in rows)
    assert all(float(row["torch_us"]) > 0 for row in rows)
