"""The fit loop: it goes on bit by bit, computes what PyTorch's own parts driven by hand do, and ends on what is not finite."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsd.errors import CheckpointError, NumericsError, OutOfMemoryError
from fastsd.training.data import Draws, Share, batches
from fastsd.training.loop import CHECKPOINT, LOG, FitOptions, ema_decay, fit, learning_rate
from tests.measured import measured
from tests.training.builders import CPU, Numbers, Toy, checkpoint, differing, fit_in_parts, logged, options, state_of


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_goes_on_bit_by_bit(precision: str, workers: int, tmp_path: Path) -> None:
    changes = {"precision": precision, "workers": workers}
    whole = fit_in_parts(tmp_path / "whole", [None], **changes)
    parts = fit_in_parts(tmp_path / "parts", [3, 1, None], **changes)
    found = differing(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))
    assert not found, f"weights, averages or the optimizer's state differ at {found[:5]}"
    assert not differing(state_of(parts), state_of(whole)), "what the task is left with differs"
    logs = [(tmp_path / name / LOG).read_text() for name in ("parts", "whole")]
    assert logs[0] == logs[1], "the stopped run logged other losses"
    assert [line["step"] for line in logged(tmp_path / "whole")] == list(range(1, 8))


def test_neither_workers_nor_samples_nor_checkpoints_change_the_result(tmp_path: Path) -> None:
    """They are not in stage.json, so a run may be gone on with under other ones."""
    plain = fit_in_parts(tmp_path / "plain", [None])
    task, seen = Toy(), []
    changes = {"workers": 2, "sample_every": 2, "checkpoint_every": 3, "log_every": 5}

    def sample(step: int) -> None:
        seen.append((step, state_of(task)))
        torch.manual_seed(step)  # as drawing pictures may

    fit(task, Numbers(), options(**changes), tmp_path / "other", sample)
    assert not differing(state_of(task), state_of(plain)), "the trained weights differ"
    assert [step for step, _ in seen] == [2, 4, 6]


@pytest.mark.parametrize("error", [OutOfMemoryError("memory"), OSError(28, "No space left on device")])
def test_pictures_that_cannot_be_drawn_do_not_end_a_run(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = []

    def sample(step: int) -> None:
        steps.append(checkpoint(tmp_path)["step"])
        raise error

    assert fit(Toy(), Numbers(), options(checkpoint_every=3, sample_every=3), tmp_path, sample)
    assert steps[0] == 3, "the steps before were not saved"
    assert f"samples of step 3: {error}; the training goes on without them" in caplog.text
    fit_in_parts(tmp_path / "other", [None])
    assert not differing(checkpoint(tmp_path), checkpoint(tmp_path / "other"))


def test_samples_are_of_the_moving_average(tmp_path: Path) -> None:
    task, seen = Toy(), {}
    fit(
        task,
        Numbers(),
        options(sample_every=3),
        tmp_path,
        lambda step: seen.update({step: state_of(task)}),
        stop_after=3,
    )
    state = checkpoint(tmp_path)
    assert not differing({n: seen[3][n] for n in state["ema"]}, state["ema"]), "the sample saw other weights"
    assert not differing({n: state_of(task)[n] for n in state["weights"]}, state["weights"]), "they were not put back"
    assert differing(state["ema"], state["weights"]), "the average equals the weights, so this tells nothing"


def test_the_same_command_twice_gives_the_same_weights(tmp_path: Path) -> None:
    first, second = (fit_in_parts(tmp_path / name, [None]) for name in "ab")
    other = fit_in_parts(tmp_path / "c", [None], seed=1)
    assert not differing(state_of(first), state_of(second))
    assert differing(state_of(first), state_of(other)), "the seed changes nothing, so this tells nothing"


def test_the_learning_rate_is_that_of_torch_s_schedulers() -> None:
    fitted = FitOptions(steps=50, learning_rate=2e-3, warmup_steps=10, final_rate=0.2)
    parameter = [nn.Parameter(torch.zeros(1))]

    def rates(scheduler: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        found = []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    rising, falling = (torch.optim.SGD(parameter, lr=2e-3) for _ in range(2))
    theirs = rates(torch.optim.lr_scheduler.LambdaLR(rising, lambda step: (step + 1) / 10), rising, 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(falling, T_max=40, eta_min=0.2 * 2e-3)
    theirs += rates(cosine, falling, 40)
    ours = [learning_rate(step, fitted) for step in range(50)]
    measured("relative error", max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)), 1e-9)
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 2e-4), (4, 1e-3), (9, 2e-3), (10, 2e-3), (20, 2e-3 * (0.2 + 0.8 * (2 + 2**0.5) / 4)), (30, 1.2e-3)],
)
def test_the_learning_rate_by_hand(step: int, expected: float) -> None:
    fitted = FitOptions(steps=50, learning_rate=2e-3, warmup_steps=10, final_rate=0.2)
    assert learning_rate(step, fitted) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_rate_begins_at_its_highest() -> None:
    fitted = FitOptions(steps=3, learning_rate=1e-3, warmup_steps=0)
    assert [learning_rate(step, fitted) for step in range(3)] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    fitted = FitOptions(steps=4, learning_rate=1e-3, warmup_steps=100)
    assert [learning_rate(step, fitted) for step in range(4)] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5])


def test_the_average_s_decay_by_hand() -> None:
    fitted = FitOptions(steps=1, ema_decay=0.75)
    steps = {0: 0.1, 1: 2 / 11, 8: 0.5, 25: 26 / 35, 26: 0.75, 27: 0.75, 1000: 0.75}
    assert {step: ema_decay(step, fitted) for step in steps} == pytest.approx(steps)


@pytest.mark.parametrize("ramp", [1.0, 2.0, 9.0])
def test_the_average_weighs_steps_by_a_power(ramp: float) -> None:
    """What each of 3,000 steps comes to in the end, by the decays after it."""
    fitted = FitOptions(steps=3000, ema_decay=0.99999, ema_ramp=ramp)
    decays = np.array([ema_decay(step, fitted) for step in range(3000)])
    shares = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
    power = np.arange(1, 3001) ** (ramp - 1)
    np.testing.assert_allclose(shares[1000:], (power / power.sum())[1000:], rtol=0.05)


def fitted_by_hand(fitted: FitOptions) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, moving average and gradient norms of the toy: torch's AdamW and schedulers, the rest written out."""
    task = Toy()
    weights = dict(task.net.named_parameters(prefix="net"))
    matrices = [w for name, w in weights.items() if name.endswith("weight")]
    vectors = [w for name, w in weights.items() if name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": fitted.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=fitted.learning_rate, betas=fitted.betas, foreach=False)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: learning_rate(s, fitted) / fitted.learning_rate)
    average = {name: w.detach().clone() for name, w in weights.items()}
    share, norms = Share(fitted.batch_size, 0, fitted.batch_size), []
    for step, batch in enumerate(batches(Numbers(), share, fitted.seed, 0, fitted.steps)):
        adam.zero_grad()
        task.losses(batch, Draws(fitted.seed, step, share, CPU), step / fitted.steps)["loss"].backward()
        norms.append(math.sqrt(sum(w.grad.square().sum().item() for w in weights.values())))
        for w in weights.values():
            w.grad *= min(1.0, fitted.clip_norm / norms[-1]) if fitted.clip_norm else 1.0
        adam.step()
        rate.step()
        decay = ema_decay(step, fitted)
        average = {name: decay * average[name] + (1 - decay) * w.detach() for name, w in weights.items()}
    return {name: w.detach() for name, w in weights.items()}, average, norms


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_it_is_adamw_driven_by_hand(clip_norm: float, tmp_path: Path) -> None:
    """A large decay, so that decaying a bias, or not decaying a matrix, would show."""
    fitted = options(steps=6, weight_decay=0.5, clip_norm=clip_norm, betas=(0.8, 0.95))
    task = Toy()
    fit(task, Numbers(), fitted, tmp_path)
    weights, average, norms = fitted_by_hand(fitted)
    state = checkpoint(tmp_path)
    torch.testing.assert_close(state["weights"], weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["ema"], average, rtol=1e-5, atol=1e-6)
    assert [line["norm"] for line in logged(tmp_path)] == pytest.approx(norms, rel=1e-4), (
        "the norm is of before the clip"
    )
    assert not differing({name: state_of(task)[name] for name in average}, state["ema"]), "the average is what is kept"


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_clipping_bounds_what_the_optimizer_sees(clip_norm: float, tmp_path: Path) -> None:
    """After one step AdamW's first moment is (1 − β₁) times the gradient that it was given."""
    fit_in_parts(tmp_path, [1], clip_norm=clip_norm, betas=(0.75, 0.9))
    moments = [entry["exp_avg"] for entry in checkpoint(tmp_path)["optimizer"]["state"].values()]
    given = math.sqrt(sum(m.square().sum().item() for m in moments)) / 0.25
    norm = logged(tmp_path)[0]["norm"]
    assert norm > 0.2, "the gradient is too small to be clipped"
    assert given == pytest.approx(clip_norm or norm, rel=1e-4)


def test_without_an_average_the_last_weights_are_kept(tmp_path: Path) -> None:
    task = fit_in_parts(tmp_path, [3, None], ema_decay=0.0)
    state = checkpoint(tmp_path)
    assert state["ema"] == {}
    assert not differing({name: state_of(task)[name] for name in state["weights"]}, state["weights"])


def test_what_is_frozen_is_neither_trained_nor_stored(tmp_path: Path) -> None:
    task = fit_in_parts(tmp_path, [None])
    assert task.frozen.tolist() == [1, 1, 1]
    assert set(checkpoint(tmp_path)["weights"]) == {f"net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize("fail", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_the_checkpoint_stays(fail: str, tmp_path: Path) -> None:
    """A gradient may be not finite where the loss is; one step with it would spoil every weight, and then the checkpoint."""
    fitted = options(steps=8, checkpoint_every=2)
    with pytest.raises(NumericsError, match=r"the (loss|gradient) is not finite at step 5"):
        fit(Toy(fail, fail_from=5 / 8), Numbers(), fitted, tmp_path / "broken")
    fit(Toy(), Numbers(), fitted, tmp_path / "healthy", stop_after=4)
    found = differing(checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "healthy"))
    assert not found, f"the checkpoint is not that of step 4: {found[:5]}"


def test_a_gradient_beyond_fp16_leaves_out_the_step(tmp_path: Path) -> None:
    """There the scaler tries again with a smaller scale: this is no error."""
    task = Toy("gradient", fail_from=6 / 7)
    assert fit(task, Numbers(), options(precision="fp16"), tmp_path)
    assert all(weight.isfinite().all() for weight in state_of(task).values())
    assert checkpoint(tmp_path)["scaler"]["scale"] == 2**15, "of 2¹⁶ before the step that was left out"


def test_the_log_forgets_what_a_lost_run_logged_after_its_checkpoint(tmp_path: Path) -> None:
    fitted = options(steps=8, checkpoint_every=4)
    with pytest.raises(NumericsError):
        fit(Toy("loss", fail_from=6 / 8), Numbers(), fitted, tmp_path / "lost")
    assert [line["step"] for line in logged(tmp_path / "lost")] == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "lost" / LOG).open("a") as file:
        file.write('{"step": 7, "lo')  # cut off by a power failure
    fit(Toy(), Numbers(), fitted, tmp_path / "lost")
    fit(Toy(), Numbers(), fitted, tmp_path / "whole")
    assert (tmp_path / "lost" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damage_text(path: Path) -> None:
    path.write_text("no checkpoint")


def damage_list(path: Path) -> None:
    torch.save([1, 2], path)


def damage_keys(path: Path) -> None:
    state = torch.load(path)
    del state["optimizer"]
    torch.save(state, path)


def damage_average(path: Path) -> None:
    state = torch.load(path)
    del state["ema"]["net.0.weight"]
    torch.save(state, path)


def damage_shape(path: Path) -> None:
    state = torch.load(path)
    state["weights"]["net.0.weight"] = torch.zeros(8, 7)
    torch.save(state, path)


def damage_names(path: Path) -> None:
    state = torch.load(path)
    state["weights"]["other"] = state["weights"].pop("net.0.weight")
    torch.save(state, path)


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_text, damage_list, damage_keys, damage_average, damage_shape, damage_names]
)
def test_a_damaged_or_foreign_checkpoint_is_refused(damage: Any, tmp_path: Path) -> None:
    fit_in_parts(tmp_path, [3])
    damage(tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match=r"^checkpoint\.pt: .*(remove it to start anew)"):
        fit(Toy(), Numbers(), options(), tmp_path)


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": {}, "step": Path("x")}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="damaged, or not one of"):
        fit(Toy(), Numbers(), options(), tmp_path)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    """Its result may not have been written: the task is then left with the average as before."""
    first = fit_in_parts(tmp_path, [None])
    before = (tmp_path / CHECKPOINT).read_bytes()
    again = Toy()
    assert fit(again, Numbers(), options(), tmp_path)
    assert not differing(state_of(again), state_of(first))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_it_says_whether_all_is_done(tmp_path: Path) -> None:
    found = [fit(Toy(), Numbers(), options(), tmp_path, stop_after=3) for _ in range(3)]
    assert found == [False, False, True]
    assert checkpoint(tmp_path)["step"] == 7
