"""Training ends at the first number that is not finite, and says where."""

import math
import re

import pytest
import torch
from tests.training.runs import run
from transformers import TrainerCallback

from latentlm import InputError, load
from latentlm.errors import DivergedError
from latentlm.training.trainer import LatentTrainer

SAVING = ("training.save_strategy=steps", "training.save_steps=2", "training.max_steps=6")


class Poison(TrainerCallback):
    """Puts a number into the weights after a step, as a step that was too large would."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, *, model, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.layers[0].feed_forward.down.weight[0, 0] = self.value


@pytest.fixture
def seen(monkeypatch):
    """The sequences of each step."""
    seen, step = [], LatentTrainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(inputs["index"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LatentTrainer, "training_step", spy)
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_the_step_the_sequences_and_the_last_good_checkpoint_are_named(tmp_path, seen, family, value):
    with pytest.raises(DivergedError) as error:
        run(tmp_path / "run", *SAVING, family=family, callbacks=[Poison(3, value)])
    message = str(error.value)
    assert "training diverged at step 4: " in message
    assert f"sequences {', '.join(map(str, seen[-1]))} of the training data" in message
    assert len(seen) == 4
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'};" in message
    assert "lower training.learning_rate and go on with --resume" in message
    assert message.count("\n") == 0
    # and it is good
    assert all(bool(torch.isfinite(weight).all()) for weight in load(tmp_path / "run" / "checkpoint-2")[0].parameters())
    whole = run(tmp_path / "whole", *SAVING, family=family)
    resumed = run(tmp_path / "run", *SAVING, family=family, resume=True)
    assert torch.equal(resumed.model.embed_tokens.weight, whole.model.embed_tokens.weight)


def test_of_accumulated_batches_all_sequences_are_candidates(tmp_path, seen):
    parts = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
    with pytest.raises(DivergedError) as error:
        run(tmp_path / "run", *SAVING, *parts, callbacks=[Poison(1, math.nan)])
    assert f"sequences {', '.join(map(str, seen[-1]))} of" in str(error.value)  # the first part tells already
    assert len(seen) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch, value):
    weights, step = {}, LatentTrainer.training_step

    def spoiled(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        weights.update({name: weight.detach().clone() for name, weight in self.model.named_parameters()})
        if self.state.global_step == 2:
            self.model.embed_tokens.weight.grad[0, 0] = value
        self.spied = self.model
        return loss

    monkeypatch.setattr(LatentTrainer, "training_step", spoiled)
    with pytest.raises(DivergedError, match=r"step 3: the norm of the gradient is (nan|inf) \(sequences \d+"):
        run(tmp_path / "run", *SAVING)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(DivergedError, match=r"step 2: the weights .* no longer finite.*there is no checkpoint"):
        run(tmp_path / "run", *SAVING, callbacks=[Poison(2, math.nan)])
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(DivergedError, match=r"no longer finite"):  # without checkpoints, at the end
        run(tmp_path / "other", callbacks=[Poison(3, math.nan)])
    assert not (tmp_path / "other" / "model.safetensors").exists()


def test_a_learning_rate_that_is_far_too_high(tmp_path):
    settings = ("training.learning_rate=1e20", "training.warmup_steps=0", "training.save_strategy=steps")
    with pytest.raises(InputError, match="training diverged at step") as error:
        run(tmp_path / "run", *settings, "training.save_steps=1")
    assert re.search(r"checkpoint-\d;|no checkpoint before it;", str(error.value))
