"""Schedule, optimiser groups, averages and the training configuration against their definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from training_samples import make_config, make_model

from tlstm import TrainingConfig
from tlstm.training.optimizer import AveragedWeights, make_optimizer, parameter_groups
from tlstm.training.schedule import Plateau, learning_rate


def rates(config: TrainingConfig, total: int, steps_per_epoch: int = 10) -> list[float]:
    return [learning_rate(config, step=s, total_steps=total, epoch=s // steps_per_epoch) for s in range(total + 3)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = make_config(lr=0.7, warmup_steps=7, schedule="constant")
    assert rates(config, 20)[:7] == pytest.approx([0.7 * n / 7 for n in range(1, 8)], rel=1e-15)
    assert rates(config, 20)[7:] == [0.7] * 16


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decaying_schedules_against_torch(schedule: str) -> None:
    """Torch's own schedulers, run step by step from the end of the warm-up, are the independent form."""
    warmup, total, low = 5, 43, 0.03
    config = make_config(lr=2e-3, warmup_steps=warmup, min_lr_ratio=low, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    if schedule == "cosine":
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=low * 2e-3)
    else:
        reference = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, low, total - warmup)
    expected = []
    for _ in range(total - warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    # Torch multiplies its way from step to step: one rounding per step.
    assert rates(config, total)[warmup:total] == pytest.approx(expected, rel=(total + 2) * 2**-52)
    assert rates(config, total)[total:] == pytest.approx([low * 2e-3] * 3, rel=1e-14)


def test_step_schedule_is_zarembas() -> None:
    config = make_config(lr=1.0, warmup_steps=0, schedule="step", decay_factor=1 / 1.15, decay_after=2)
    assert rates(config, 50)[::10] == pytest.approx([1, 1, 1 / 1.15, 1.15**-2, 1.15**-3, 1.15**-4], rel=1e-14)


def test_plateau_falls_after_patience_bad_evaluations_and_stops_at_its_floor() -> None:
    plateau = Plateau(factor=0.5, patience=2, floor=0.2)
    scales = []
    for loss in [3.0, 2.0, 2.0, 2.5, 1.9, 1.95, 1.9, 1.91, 1.92]:
        plateau.observe(loss)
        scales.append(plateau.scale)
    assert scales == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2]
    copy = Plateau(factor=0.5, patience=2, floor=0.2)
    copy.load_state_dict(json.loads(json.dumps(plateau.state_dict())))
    assert vars(copy) == vars(plateau)
    fresh = Plateau(0.5, 2, 0.2)
    fresh.load_state_dict(json.loads(json.dumps(Plateau(0.5, 2, 0.2).state_dict())))
    assert fresh.best == math.inf


def test_only_matrices_decay_and_a_tied_weight_counts_once() -> None:
    model = make_model(layer_sizes=[13, 13], tie_word_embeddings=True)
    decaying, plain = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in plain["params"]} == {"bias", "bias_ih_l0", "bias_hh_l0"}
    everything = [*decaying["params"], *plain["params"]]
    assert len({id(parameter) for parameter in everything}) == len(everything) == len(names)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        ({"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-7}, torch.optim.AdamW),
        ({"optimizer": "sgd", "momentum": 0.7}, torch.optim.SGD),
    ],
)
def test_optimizers_against_torchs_plain_loops(ours: dict, reference: type) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = make_optimizer(model, make_config(lr=0.02, weight_decay=0.3, **ours))
    options = {key: value for key, value in ours.items() if key != "optimizer"}
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    expected = reference(groups, lr=0.02, foreach=False, fused=False, **options)
    x = torch.randint(0, 11, (5, 9))
    for _ in range(6):
        for net, opt in ((model, optimizer), (twin, expected)):
            net(x, labels=x).loss.backward()
            opt.step()
            opt.zero_grad()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_averages_against_their_definition() -> None:
    model = make_model(torch.float64, layer_sizes=[13, 13], tie_word_embeddings=True)
    average = AveragedWeights(model, decay=0.6)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
        decay = min(0.6, (step + 1) / (step + 10))
        expected = {name: decay * expected[name] + (1 - decay) * p.detach() for name, p in model.named_parameters()}
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.applied():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-13, atol=1e-14)
        assert model.lm_head.weight is model.model.embedding.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name])


def test_config_round_trip() -> None:
    config = make_config(betas=(0.5, 0.75), autocast="bf16", schedule="plateau", max_steps=None, random_window=True)
    assert TrainingConfig.from_dict(json.loads(config.to_json())) == config
    with pytest.raises(ValueError, match=r"run.json: unknown settings \['learning_rate'\]"):
        TrainingConfig.from_dict({"learning_rate": 1.0}, source="run.json")
    with pytest.raises(ValueError, match=r"run.json: lr: expected a number in \(0, inf\), got 0"):
        TrainingConfig.from_dict({"lr": 0}, source="run.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("window", 2.5), ("max_steps", 0), ("epochs", 0), ("epochs", math.inf), ("lr", -1.0),
        ("lr", math.nan), ("betas", (0.9, 1.0)), ("betas", 0.9), ("weight_decay", -0.1), ("schedule", "cosin"),
        ("optimizer", "adam"), ("autocast", "fp8"), ("ema_decay", 1.0), ("valid_fraction", 1.0), ("keep_last", 0),
        ("random_window", 1), ("gradient_accumulation", 4), ("save_dtype", "int8"), ("min_lr_ratio", 1.5),
        ("seed", -1), ("clip_norm", True), ("export", "worst"),
    ],
)  # fmt: skip
def test_config_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected"):
        make_config(**{field: value})
