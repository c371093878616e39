"""transformers' `Trainer` on a tlstm model, against the same steps made by hand with tlstm."""

from __future__ import annotations

import pytest
import torch
import transformers

from tlstm import LSTMForCausalLM

STEPS, LEARNING_RATE = 3, 0.5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_steps_of_the_trainer(own, theirs, tmp_path, accumulate):
    """Labels that do not count are spread unevenly, so that a mean of means would be another loss."""
    ids = torch.randint(0, 65, (6, 13))
    labels = ids.masked_fill(torch.rand(6, 13) < torch.linspace(0, 0.8, 6)[:, None], -100)
    labels[:, 0] = -100  # nothing predicts the first token, but the Trainer of transformers 5.0 counts it
    arguments = transformers.TrainingArguments(
        tmp_path / "runs",
        max_steps=STEPS,
        per_device_train_batch_size=6 // accumulate,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    trainer = transformers.Trainer(theirs, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    own.save_pretrained(tmp_path / "copy")
    model = LSTMForCausalLM.from_pretrained(tmp_path / "copy").train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert found == pytest.approx(losses, rel=1e-4)
    trainer.save_model(tmp_path / "trained")
    trained = LSTMForCausalLM.from_pretrained(tmp_path / "trained")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor)
    with torch.no_grad():
        expected = model.eval()(ids, labels=labels).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
