"""The training loop: resuming is exact, divergence stops a phase alone, checkpoints refuse what they are not."""

import io
import os
import pickle
import signal
import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from effbert import checkpoint, files, random
from effbert.data.batches import BatchPlan
from effbert.engine import LOSSES_KEPT, Phase, Trainee, forget, train, train_together
from effbert.kernels import philox
from effbert.optim import TrainingArguments

ROWS = datasets.Dataset.from_dict({"input_ids": [[1 + (7 * i + j) % 9 for j in range(1 + i % 5)] for i in range(43)]})


class Tiny(nn.Module):
    """Predicts nothing useful, but has dropout and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6)
        self.out = nn.Linear(6, 1)

    def forward(self, batch):
        x = self.table(batch.input_ids) * batch.attention_mask[..., None]
        x = philox.apply(x, philox.Dropout(0.3, random.drawn_key(), 0))
        return (self.out(x).mean(dim=(1, 2)) - 1.0).square().mean()


def plan_of(epoch):
    return BatchPlan(ROWS, 4, pad_token_id=0, seed=5, name="t", epoch=epoch)


ARGUMENTS = TrainingArguments(learning_rate=0.05, num_train_epochs=3, gradient_accumulation_steps=2)


def run(phase, arguments=ARGUMENTS, on_step=None, spoil_at=None):
    model = Tiny()

    def loss_of(batch, number):
        loss = model(batch)
        return loss * float("nan") if number == spoil_at else loss

    result = train(model, plan_of, loss_of, arguments, phase, after_epoch=lambda e: {"epoch": e}, on_step=on_step)
    return model, result


class Killed(BaseException):
    pass


def kill_at(moment):
    def kill(at):
        if at.step == moment:
            raise Killed

    return kill


@pytest.mark.parametrize("moment", [1, 5, 6, 7, 17])
def test_a_phase_killed_after_any_step_ends_as_if_undisturbed(tmp_path, moment):
    whole, expected = run(Phase(("p", 1), 3))
    phase = Phase(("p", 1), 3, tmp_path / "p.pt", "settings", save_seconds=-1.0)
    with pytest.raises(Killed):
        run(phase, on_step=kill_at(moment))
    model, result = run(phase)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert (result.steps, result.tokens, result.loss, result.epochs, result.losses) == (
        expected.steps,
        expected.tokens,
        expected.loss,
        expected.epochs,
        expected.losses,
    )
    assert len(result.losses) == 3
    forget([phase])
    assert not phase.checkpoint.exists()


@pytest.mark.parametrize("epochs,every", [(1, 10), (3, 10), (60, 30)])
def test_the_losses_that_are_read_are_kept_for_a_curve(epochs, every):
    model, seen = Tiny(), []

    def loss_of(batch, number):
        loss = model(batch)
        seen.append(float(loss))
        return loss

    arguments = TrainingArguments(learning_rate=0.05, num_train_epochs=epochs)
    losses = train(model, plan_of, loss_of, arguments, Phase(("p",), 3)).losses
    ends = sorted({*range(every, len(seen) + 1, every), len(seen)})
    means = [sum(seen[(end - 1) // 10 * 10 : end]) / (end - (end - 1) // 10 * 10) for end in ends]
    assert [place for place, _ in losses] == pytest.approx(
        [1 / len(seen), *(end / len(seen) for end in ends)], rel=1e-3
    )
    assert [loss for _, loss in losses] == pytest.approx([seen[0], *means], rel=1e-3)
    assert len(losses) <= LOSSES_KEPT + 2


def test_a_checkpoint_from_before_losses_were_kept_is_gone_on_from(tmp_path):
    phase = Phase(("p",), 3, tmp_path / "p.pt")
    whole, expected = run(Phase(("p",), 3))
    with pytest.raises(KeyboardInterrupt):
        run(phase, on_step=lambda at: os.kill(os.getpid(), signal.SIGINT) if at.step == 12 else None)
    state = checkpoint.load(phase.checkpoint, phase.fingerprint)
    assert state.pop("losses") == expected.losses[:-1]
    checkpoint.save(phase.checkpoint, phase.fingerprint, state)
    model, result = run(phase)
    assert_same(model, whole)
    assert result.losses == expected.losses[-1:]


def test_ctrl_c_finishes_the_step_saves_and_resumes(tmp_path):
    whole, _ = run(Phase(("p", 1), 3))
    phase = Phase(("p", 1), 3, tmp_path / "p.pt")

    def interrupt(at):
        if at.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(phase, on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.load(phase.checkpoint, phase.fingerprint)["step"] == 4
    model, _ = run(phase)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_ctrl_c_in_an_evaluation_is_not_lost(tmp_path):
    phase = Phase(("p",), 3, tmp_path / "p.pt")
    model = Tiny()

    def evaluate(epoch):
        os.kill(os.getpid(), signal.SIGINT)
        return {"epoch": epoch}

    with pytest.raises(KeyboardInterrupt):
        train(model, plan_of, lambda batch, number: model(batch), ARGUMENTS, phase, after_epoch=evaluate)
    assert checkpoint.load(phase.checkpoint, phase.fingerprint)["records"] == [{"epoch": 0}]


def test_a_gradient_that_is_not_finite_on_the_last_step_ends_the_phase():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    model, batches = Root(), len(plan_of(0))

    def loss_of(batch, number):
        return model.weight.abs().sqrt().sum() if number == batches - 1 else (model.weight * 0).sum()

    assert not train(model, plan_of, loss_of, TrainingArguments(num_train_epochs=1), Phase(("p",), 0)).finished


def test_a_checkpoint_that_misses_a_part_is_one_line(tmp_path):
    phase = Phase(("p",), 3, tmp_path / "p.pt")
    checkpoint.save(phase.checkpoint, phase.fingerprint, {"step": 1})
    with pytest.raises(ValueError, match="does not fit this phase"):
        run(phase)


def test_a_model_that_is_no_longer_finite_is_not_scored():
    arguments = replace(ARGUMENTS, load_best_model_at_end=True, eval_steps=4)
    model, seen = Tiny(), []

    def rank():
        seen.append(bool(model.out.weight.isfinite().all()))
        return 0.0

    loss_of = lambda batch, number: model(batch) * (float("nan") if number == 12 + 4 else 1.0)  # noqa: E731
    result = train(model, plan_of, loss_of, arguments, Phase(("p",), 3), rank=rank)
    assert seen == [True, True] and result.diverged == "loss not finite at step 10"


@pytest.mark.parametrize("failing", range(6))
def test_memory_that_ends_in_a_score_changes_nothing(failing):
    """Whichever of the six scores of the second of three models it is."""
    arguments = replace(ARGUMENTS, load_best_model_at_end=True, eval_steps=4)

    def together(failing=None):
        models, asked = {name: Tiny() for name in (1, 2, 3)}, {1: 0, 2: 0, 3: 0}

        def trainee(name):
            def rank():
                asked[name] += 1
                if name == 2 and asked[name] == (failing or 0) + 1 and failing is not None:
                    raise torch.OutOfMemoryError("out of memory")
                return float(torch.sin(2000 * models[name].out.weight.detach().sum()))

            phase = Phase(("p", name), 3)
            loss_of = lambda batch, number, _: models[name](batch)  # noqa: E731
            return Trainee(models[name], loss_of, phase, lambda epoch: {"epoch": epoch}, rank)

        results = train_together([trainee(name) for name in models], plan_of, arguments)
        return models, [(found.best_step, found.loss, found.epochs, found.steps) for found in results]

    (models, results), (others, expected) = together(failing), together()
    assert results == expected and len(expected[1][2]) == 3
    for name, model in models.items():
        assert_same(model, others[name])


def ranked(folder, moment=None):
    """A phase that ends with its best step, by a score that goes up and down with the weights; killed at a step."""
    arguments = replace(ARGUMENTS, load_best_model_at_end=True, eval_steps=4)
    folder.mkdir(exist_ok=True)
    model, seen = Tiny(), []

    def rank():
        assert not model.training
        score = float(torch.sin(5000 * model.out.weight.detach().sum()))
        seen.append((score, [parameter.detach().clone() for parameter in model.parameters()]))
        return score

    def kill(at):
        if at.step == moment:
            raise Killed

    phase = Phase(("p",), 3, folder / "p.pt", save_seconds=-1.0)
    result = train(model, plan_of, lambda b, n: model(b), arguments, phase, rank=rank, on_step=kill)
    return model, result, seen


def test_a_phase_ends_with_the_weights_of_its_best_step(tmp_path):
    model, result, seen = ranked(tmp_path / "a")
    steps = [4, 6, 10, 12, 16, 18]  # every fourth of an epoch of six, and its last
    best = max(range(len(seen)), key=lambda index: seen[index][0])
    assert (len(seen), result.steps, result.best_step) == (len(steps), 18, steps[best]) and 0 < best < 5
    for parameter, kept in zip(model.parameters(), seen[best][1], strict=True):
        assert torch.equal(parameter, kept)
    last, plain = run(Phase(("p",), 3))
    assert plain.best_step == 0 and not torch.equal(last.out.weight, model.out.weight)


@pytest.mark.parametrize("moment", [5, 7, 11, 17])
def test_the_best_step_survives_a_kill(tmp_path, moment):
    whole, expected, _ = ranked(tmp_path / "a")
    with pytest.raises(Killed):
        ranked(tmp_path / "b", moment)
    model, result, _ = ranked(tmp_path / "b")
    assert_same(model, whole)
    assert (result.best_step, result.loss) == (expected.best_step, expected.loss)
    again, result, _ = ranked(tmp_path / "b")  # what ended, from its last checkpoint
    assert_same(again, whole)
    assert result.best_step == expected.best_step


def test_eval_steps_without_a_choice_to_make_are_refused():
    with pytest.raises(ValueError, match="nothing is chosen by it"):
        TrainingArguments(eval_steps=5)


def test_accumulated_gradients_are_the_mean_over_the_group():
    one = TrainingArguments(learning_rate=0.05, num_train_epochs=1, gradient_accumulation_steps=1)
    _, single = run(Phase(("p",), 0), one)
    _, double = run(Phase(("p",), 0), TrainingArguments(**{**vars(one), "gradient_accumulation_steps": 2}))
    batches = len(plan_of(0))
    assert single.steps == batches and double.steps == -(-batches // 2)
    assert single.tokens == double.tokens == sum(len(row) for row in ROWS["input_ids"])


def test_a_non_finite_loss_ends_the_phase_within_twenty_steps_without_raising():
    arguments = TrainingArguments(learning_rate=0.05, num_train_epochs=9)
    _, result = run(Phase(("p",), 0), arguments, spoil_at=2)
    assert not result.finished and result.steps <= 20


def test_other_seeds_and_names_train_differently():
    base = next(run(Phase(("p", 1), 3))[0].parameters())
    for phase in (Phase(("p", 2), 3), Phase(("p", 1), 4)):
        assert not torch.equal(base, next(run(phase)[0].parameters()))


def test_each_step_says_where_the_phase_stands_and_the_loss_that_was_read_last():
    model, seen, losses = Tiny(), [], []

    def loss_of(batch, number):
        losses.append(model(batch))
        return losses[-1]

    arguments = TrainingArguments(learning_rate=0.0, num_train_epochs=4, gradient_accumulation_steps=2)
    train(model, plan_of, loss_of, arguments, Phase(("p", "general"), 0), on_step=seen.append)
    steps = -(-len(plan_of(0)) // 2)
    assert [at[:3] for at in seen] == [(step, 4 * steps, "general") for step in range(1, 4 * steps + 1)]
    assert not any(at.losses for at in seen[:steps]) and all(len(at.losses) == 1 for at in seen[steps:])
    of_epoch = torch.stack(losses[: len(plan_of(0))]).sum() / (2 * steps)
    assert seen[steps].losses[0] == pytest.approx(float(of_epoch))


def together(names, arguments=ARGUMENTS, folder=None, on_step=None, spoil=None):
    """Several Tiny models in step; `spoil(name, number)` gives a factor for the loss."""
    models = {name: Tiny() for name in names}
    shared = []

    def trainee(name):
        def loss_of(batch, number, numbers):
            assert numbers == batch.indices.tolist()
            factor = spoil(name, number) if spoil else 1.0
            return models[name](batch) * factor

        phase = Phase(("p", name), 3, folder and folder / f"{name}.pt", save_seconds=-1.0)
        return Trainee(models[name], loss_of, phase, lambda epoch: {"epoch": epoch})

    def share(batch):
        shared.append(batch.indices.tolist())
        return shared[-1]

    results = train_together([trainee(name) for name in names], plan_of, arguments, share=share, on_step=on_step)
    return models, dict(zip(names, results, strict=True)), shared


def assert_same(models, others):
    for mine, theirs in zip(models.parameters(), others.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(params=[1, 2, 5])
def cores(request):
    """How many threads PyTorch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_models_trained_together_are_the_same_as_alone_and_share_one_look_at_each_batch(cores):
    models, results, shared = together([1, 2, 3])
    assert len(shared) == 3 * len(plan_of(0))
    for name, model in models.items():
        alone, expected = run(Phase(("p", name), 3))
        assert_same(model, alone)
        assert (results[name].loss, results[name].epochs) == (expected.loss, expected.epochs)
        assert results[name].losses == expected.losses and len(expected.losses) == 3
    assert not torch.equal(models[1].out.weight, models[2].out.weight)


def test_models_that_have_a_core_each_come_to_the_same_bit_for_bit_as_with_one_thread(monkeypatch):
    table = nn.Embedding
    monkeypatch.setattr(nn, "Embedding", lambda rows, width: table(rows, 8192))  # so wide that PyTorch splits its ops
    linear = nn.Linear
    monkeypatch.setattr(nn, "Linear", lambda width, out: linear(8192, out))
    alone = {name: run(Phase(("p", name), 3))[0] for name in (1, 2, 3)}
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        models, _, _ = together([1, 2, 3])
    finally:
        torch.set_num_threads(before)
    for name, model in models.items():
        assert_same(model, alone[name])


@pytest.mark.parametrize("moment", [3, 7, 12])
def test_models_that_were_saved_at_different_steps_catch_up(tmp_path, moment, cores):
    def kill(at):
        if at.step == moment:
            raise Killed

    with pytest.raises(Killed):
        together([1, 2], folder=tmp_path, on_step=kill)
    (tmp_path / "2.pt").unlink(missing_ok=True)
    models, results, _ = together([1, 2], folder=tmp_path)
    for name in (1, 2):
        alone, expected = run(Phase(("p", name), 3))
        assert_same(models[name], alone)
        assert (results[name].steps, results[name].tokens) == (expected.steps, expected.tokens)


def test_one_that_diverges_stops_and_the_others_go_on(cores):
    arguments = TrainingArguments(learning_rate=0.001, num_train_epochs=9)
    for factor, reason in ((float("nan"), "loss not finite"), (1e3, "loss grown from")):
        models, results, _ = together(
            [1, 2], arguments, spoil=lambda name, number, f=factor: f if number > 14 and name == 1 else 1.0
        )
        assert not results[1].finished and results[1].steps <= 15 + 20 and results[1].diverged.startswith(reason)
        alone, _ = run(Phase(("p", 2), 3), arguments)
        assert results[2].finished
        assert_same(models[2], alone)


def too_much():
    torch.empty(2**60)


def too_much_on_a_gpu():
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("exhaust", [too_much, too_much_on_a_gpu])
def test_where_memory_does_not_hold_all_half_of_them_go_first(exhaust, cores):
    failed = []

    def spoil(name, number):
        if number == 5 and name == 3 and not failed:
            failed.append(number)
            exhaust()
        return 1.0

    models, results, shared = together([1, 2, 3, 4], spoil=spoil)
    assert failed and all(result.finished for result in results.values())
    for name, model in models.items():
        assert_same(model, run(Phase(("p", name), 3))[0])
    assert len(shared) > 3 * len(plan_of(0))


def test_after_a_back_off_all_models_are_back_on_the_device(monkeypatch):
    moves, failed = [], []
    move = Tiny.to
    monkeypatch.setattr(Tiny, "to", lambda self, device: moves.append((id(self), str(device))) or move(self, device))

    def spoil(name, number):
        if not failed:
            failed.append(number)
            raise torch.OutOfMemoryError("out of memory")
        return 1.0

    device = "cpu:0"  # another name than that of the place to wait
    models = {name: Tiny() for name in (1, 2)}
    trainees = [
        Trainee(model, lambda batch, number, _, n=name: models[n](batch) * spoil(n, number), Phase(("p", name), 3))
        for name, model in models.items()
    ]
    train_together(trainees, plan_of, ARGUMENTS, device=device)
    last = {model: [where for moved, where in moves if moved == id(models[model])][-1] for model in models}
    assert failed and last == {1: device, 2: device}
    assert any(where == "cpu" for _, where in moves)


def test_memory_that_ends_while_moments_are_made_lets_the_step_be_tried_again(monkeypatch):
    zeros, calls = torch.zeros_like, []

    def scarce(tensor, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return zeros(tensor, **options)

    monkeypatch.setattr("effbert.optim.torch.zeros_like", scarce)
    models, results, _ = together([1, 2])
    assert len(calls) > 4 and all(result.finished for result in results.values())
    monkeypatch.undo()
    for name, model in models.items():
        assert_same(model, run(Phase(("p", name), 3))[0])


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_odd_batch_at_the_end_of_an_epoch_is_no_divergence(epochs):
    last = len(plan_of(0)) - 1
    assert (last + 1) % 10  # so that a window ends early
    arguments = TrainingArguments(learning_rate=0.0, num_train_epochs=epochs)
    _, results, _ = together([1], arguments, spoil=lambda name, number: 12.0 if number == last else 1.0)
    assert results[1].finished


@pytest.mark.parametrize(("begin", "stopped"), [(3, 10), (5, 10), (10, 11)])
def test_a_loss_that_explodes_in_a_short_phase_is_divergence(begin, stopped):
    """Also among the first steps, after which it stays where it is, and among the last."""
    assert len(plan_of(0)) == 11
    arguments = TrainingArguments(learning_rate=0.0, num_train_epochs=1)
    _, results, _ = together([1], arguments, spoil=lambda name, number: 1e9 if number >= begin else 1.0)
    assert (results[1].finished, results[1].steps) == (False, stopped) and "loss grown from" in results[1].diverged


@pytest.mark.parametrize("partly_used", [None, lambda numbers: {}])
@pytest.mark.parametrize("begin", [6, 7, 8, 9])
def test_a_loss_that_explodes_late_in_the_first_window_is_divergence(begin, partly_used):
    """Its own height is not what the next window is judged by; one odd batch there is none."""
    arguments = TrainingArguments(learning_rate=0.0, num_train_epochs=3)

    def run(last):
        model = Tiny()
        loss_of = lambda batch, number: model(batch) * 0 + (1e9 if begin <= number < last else 1.0)  # noqa: E731
        return train(model, plan_of, loss_of, arguments, Phase(("p", 1), 3), partly_used=partly_used)

    assert run(99).diverged == f"loss grown from {'1' if partly_used is None else '10'} to 1e+09 at step 20"
    assert run(begin + 1).finished


def test_a_phase_of_few_steps_diverges_too():
    arguments = TrainingArguments(learning_rate=0.0, num_train_epochs=1, gradient_accumulation_steps=4)
    _, results, _ = together([1], arguments, spoil=lambda name, number: 1e9 if number >= 4 else 1.0)
    assert (results[1].finished, results[1].steps) == (False, 3)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_small_first_loss_and_large_ones_after_it_are_no_divergence(epochs):
    """As of a regression on few rows; and where a step uses a part of a supernet, or another task, none compares."""
    arguments = TrainingArguments(learning_rate=0.0, num_train_epochs=epochs)

    def run(factor, partly_used=None):
        model = Tiny()
        loss_of = lambda batch, number: model(batch) * 0 + factor(number)  # noqa: E731
        return train(model, plan_of, loss_of, arguments, Phase(("p", 1), 3), partly_used=partly_used)

    assert run(lambda number: 1.0 if number % 7 == 0 else 2500.0).finished
    assert run(lambda number: 1.0 if number == 0 else 2500.0, lambda numbers: {}).finished
    assert not run(lambda number: 1.0 if number == 0 else 2500.0).finished


def test_one_that_does_not_fit_alone_is_an_error():
    def spoil(name, number):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        together([1, 2], spoil=spoil)


def saved(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, "phase a", {"model": {"w": torch.arange(3.0)}, "step": 2})
    return path


def test_a_checkpoint_comes_back_whole(tmp_path):
    state = checkpoint.load(saved(tmp_path), "phase a")
    assert torch.equal(state["model"]["w"], torch.arange(3.0)) and state["step"] == 2


def test_a_checkpoint_of_another_phase_says_whose_it_is(tmp_path):
    with pytest.raises(ValueError, match="belongs to 'phase a', not to 'phase b'"):
        checkpoint.load(saved(tmp_path), "phase b")


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path, keep):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="delete it to restart") as error:
        checkpoint.load(path, "phase a")
    assert "\n" not in str(error.value)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_a_checkpoint_with_code_is_refused_and_not_executed(tmp_path):
    target = str(tmp_path / "exploded")
    path = saved(tmp_path)
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            data = pickle.dumps(Bomb(target), protocol=2) if name.endswith("data.pkl") else old.read(name)
            new.writestr(name, data)
    path.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="not executed"):
        checkpoint.load(path, "phase a")
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(ValueError, match="delete it"):
        checkpoint.load(path, "phase a")
    assert not os.path.exists(target)


def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tmp_path, monkeypatch):
    path = saved(tmp_path)

    def full(state, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left on device") as error:
        checkpoint.save(path, "phase a", {"step": 3})
    assert isinstance(error.value, files.DiskFullError) and "\n" not in str(error.value)
    monkeypatch.undo()
    assert checkpoint.load(path, "phase a")["step"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": -1.0}, {"warmup_ratio": 2.0}, {"num_train_epochs": -1}, {"gradient_accumulation_steps": 0}],
)
def test_arguments_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        TrainingArguments(**changes)


def test_the_same_batch_number_draws_the_same_numbers_whatever_ran_before():
    seen = []

    def record(batch, number):
        seen.append((number, float(torch.rand(()))))
        return torch.zeros((), requires_grad=True) * 1.0

    for _ in range(2):
        np.random.seed(len(seen))
        torch.manual_seed(len(seen))
        train(Tiny(), plan_of, record, TrainingArguments(num_train_epochs=1), Phase(("p",), 0))
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
