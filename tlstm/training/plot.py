"""The loss curve of a run, from its log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tlstm.training.log import read_log

logger = logging.getLogger(__name__)


def write_loss_curve(out_dir: str | os.PathLike[str], *, name: str = "loss_curve") -> list[Path]:
    """Plot training and validation loss over tokens into `<name>.png` and `<name>.svg`.

    Returns:
        The files written, the PNG first; none, with a line in the log, where matplotlib (the `plot` extra) is not
        installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no loss curve: matplotlib is not installed (pip install tlstm[plot])")
        return []
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    records = read_log(out_dir)
    for event, key, label, style in (
        ("train", "train_loss", "training (dropout on)", {"linewidth": 0.8, "alpha": 0.8}),
        ("valid", "valid_loss", "validation", {"marker": ".", "linewidth": 1.4}),
    ):
        points = [(record["tokens"] / 1e6, record[key]) for record in records if record["event"] == event]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("tokens trained on, millions")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [Path(out_dir) / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
