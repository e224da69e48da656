"""What ends a run, what is averaged, what is measured when: the options of fit."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import _compile, _fit, _step, _training
from lossloop._stopping import EarlyStopping, Patience, as_early_stopping


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    """What is captured matters here, and not the code that is generated for it."""
    monkeypatch.setattr(_compile, "inductor", lambda graph, inputs, **_: graph.forward)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def data(count=22, seed=1):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=draw)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def loader(count=22, batch=4, seed=1):
    return DataLoader(
        data(count, seed),
        batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(2),
    )


def run(model=None, train=None, val=None, **options):
    options = {"epochs": 4, "compile": False, "progress": False, **options}
    model = net() if model is None else model
    optimizer = options.pop("optimizer", ll.optim.SGD(lr=0.05))
    train = loader() if train is None else train
    return ll.fit(model, nn.MSELoss(), optimizer, train, val, **options)


# --- the end of a run -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 23, 24, 100])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_ends_after_so_many_steps(steps, streamed):
    """It is the beginning of the longer run."""
    train = list(loader()) if streamed else None
    result = run(train=train, max_steps=steps)
    made = min(steps, 4 * 6)
    assert result.history[-1]["step"] == made
    assert result.status == ("max_steps" if steps <= 24 else "finished")
    assert len(result.history) == math.ceil(made / 6)
    longer = run(train=train)
    whole = made // 6
    assert result.history["train_loss"][:whole] == longer.history["train_loss"][:whole]
    assert all(row["n_train"] == 22 for row in list(result.history)[:whole])


def test_what_limits_the_steps_leaves_the_compiled_fold():
    result = run(max_steps=9, compile=True)
    eager = run(max_steps=9)
    assert result.compiled.folded
    assert result.history["n_train"] == eager.history["n_train"] == [22, 12]
    assert result.history["train_loss"] == pytest.approx(eager.history["train_loss"])


def test_a_run_ends_when_its_time_is_over(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(_training, "perf_counter", lambda: float(next(clock)))
    result = run(max_seconds=10.0)
    assert result.status == "max_seconds"
    assert 6 < result.history[-1]["step"] < 12
    assert run(max_seconds=1e6).status == "finished"


@pytest.mark.parametrize("last", [1, 4, 9])
def test_on_step_sees_every_step_and_may_end_the_run(last):
    seen = []

    def on_step(record):
        seen.append((record.epoch, int(record.opt_state.step), record.mean.value()))
        assert record.params["0.weight"].shape == (8, 3)
        return "stop" if int(record.opt_state.step) == last else None

    result = run(on_step=on_step, val=(torch.ones(2, 3), torch.ones(2, 1)))
    assert [step for _, step, _ in seen] == list(range(1, last + 1))
    assert [epoch for epoch, _, _ in seen] == [1 + i // 6 for i in range(last)]
    assert result.status == "on_step"
    assert result.history[-1]["train_loss"] == seen[-1][2]
    assert result.history[-1]["val_loss"] is not None


def test_on_step_is_handed_the_weights_after_the_step():
    weights = []
    result = run(
        on_step=lambda record: weights.append(record.params["3.bias"].clone()), epochs=1
    )
    assert len(weights) == 6
    assert torch.equal(weights[-1], result.params["3.bias"])
    assert not torch.equal(weights[-1], weights[-2])


@pytest.mark.parametrize("compile", [True, False])
def test_on_step_changes_nothing(compile):
    watched = run(on_step=lambda record: None, compile=compile, max_steps=8)
    alone = run(compile=compile, max_steps=8)
    assert watched.history["train_loss"] == pytest.approx(
        alone.history["train_loss"], rel=1e-6
    )
    if compile:
        assert "on_step" in watched.compiled.reason


def test_on_epoch_ends_a_run():
    result = run(on_epoch=lambda record: "stop")
    assert (result.status, len(result.history)) == ("on_epoch", 1)


# --- early stopping -------------------------------------------------------------------


def rows(*values, column="val_loss"):
    return [{column: value} for value in values]


@pytest.mark.parametrize(
    ("rule", "values", "ends"),
    [
        (EarlyStopping(2), [3, 2, 2, 2, 1], 4),
        (EarlyStopping(2), [3, 2, 2.1, 1.9, 2, 2], 6),
        (EarlyStopping(1, 0.5), [3, 2.6, 1], 2),
        (EarlyStopping(2), [math.nan, math.nan, 1], 2),
        (EarlyStopping(2), [3, None, None, None, 4, 4], 6),
        (EarlyStopping(2, mode="max"), [1, 2, 2, 1], 4),
        (EarlyStopping(3), [3, 2, 1, 0], None),
    ],
)
def test_when_patience_is_lost(rule, values, ends):
    patience = Patience(rule)
    lost = [patience.lost(row) for row in rows(*values)]
    assert (lost.index(True) + 1 if True in lost else None) == ends


def test_a_run_that_does_not_improve_ends_and_keeps_its_best_weights():
    model = net()
    val = tuple(data(8, seed=5).tensors)
    result = run(
        model,
        val=val,
        epochs=100,
        early_stopping=3,
        optimizer=ll.optim.SGD(lr=0.5),
    )
    losses = result.history["val_loss"]
    assert result.status == "early_stopping"
    assert len(losses) == losses.index(min(losses)) + 1 + 3 < 100
    again = ll.fold_eval(
        ll.make_eval_step(ll.supervised(model, nn.MSELoss())), result.params, [val]
    )
    assert again.value() == min(losses)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (0, "patience >= 1"),
        (EarlyStopping(1, -1.0), "min_delta >= 0"),
        (EarlyStopping(1, on="accuracy"), "watches 'accuracy', which this run"),
        (EarlyStopping(1, mode="least"), "'min' or 'max'"),
        (1, "watches 'val_loss'"),
    ],
)
def test_rules_that_cannot_work_are_refused(rule, message):
    val = None if rule == 1 else (torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match=message):
        run(val=val, early_stopping=rule)
    with pytest.raises(TypeError, match="a number of epochs or an EarlyStopping"):
        run(early_stopping="soon")


def test_whether_higher_is_better_has_to_be_said_of_a_metric():
    """Or a run would end because its accuracy rose."""
    columns = ["train_loss", "val_loss", "val_accuracy"]
    with pytest.raises(ValueError, match=r"'val_accuracy', of .* pass mode='max', or"):
        as_early_stopping(EarlyStopping(1, on="val_accuracy"), columns)
    for on, mode in (
        ("train_loss", None),
        ("val_loss", "max"),
        ("val_accuracy", "min"),
    ):
        rule = EarlyStopping(1, on=on, mode=mode)
        assert as_early_stopping(rule, columns) is rule


# --- what is measured, and when -------------------------------------------------------


def test_validation_every_few_epochs_and_at_the_end():
    val = tuple(data(8, seed=5).tensors)
    result = run(val=val, epochs=8, eval_every=3)
    every = run(val=val, epochs=8)
    measured = [loss is not None for loss in result.history["val_loss"]]
    assert measured == [False, False, True, False, False, True, False, True]
    for loss, all_losses in zip(
        result.history["val_loss"], every.history["val_loss"], strict=True
    ):
        assert loss in (None, all_losses)
    assert result.history["train_loss"] == every.history["train_loss"]


@pytest.mark.parametrize("sample", [False, True])
def test_the_training_loss_with_frozen_weights(sample):
    given = tuple(data(10).tensors) if sample else True
    model, train = net(), loader()
    result = run(model, train, frozen_train_loss=given, restore_best=False)
    goal = ll.supervised(model, nn.MSELoss())
    batches = [given] if sample else [tuple(data().tensors)]
    expected = ll.fold_eval(ll.make_eval_step(goal), result.params, batches).value()
    assert result.history[-1]["frozen_train_loss"] == pytest.approx(expected, rel=1e-6)
    assert result.history["train_loss"] == run().history["train_loss"]


def test_frozen_batches_are_those_of_the_loader_in_order():
    class Pairs(torch.utils.data.Sampler):
        def __iter__(self):
            return iter([[3, 1], [0]])

        def __len__(self):
            return 2

    dataset = TensorDataset(torch.arange(4.0), torch.arange(4.0))
    for each, sizes in (
        (DataLoader(dataset, 3, shuffle=True, drop_last=True), [3, 1]),
        (DataLoader(dataset, batch_sampler=Pairs()), [1, 1, 1, 1]),
    ):
        state = torch.get_rng_state()
        batches = list(_fit.in_order(each))
        assert [len(inputs) for inputs, _ in batches] == sizes
        assert torch.cat([inputs for inputs, _ in batches]).tolist() == [0, 1, 2, 3]
        assert torch.equal(torch.get_rng_state(), state)
    batches = [(torch.ones(1), torch.ones(1))]
    assert _fit.in_order(batches) is batches


# --- averages and half precision ------------------------------------------------------


@pytest.mark.parametrize("compile", [True, False])
def test_the_average_is_validated_and_kept(compile):
    """As by hand: AveragedModel after each step, measured after each epoch."""
    model = net()
    val = tuple(data(8, seed=5).tensors)
    result = run(
        model, list(loader()), val, ema=0.8, compile=compile, restore_best=False
    )
    twin, batches = net(), list(loader())
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(4):
        twin.train()
        for inputs, targets in batches:
            sgd.zero_grad()
            nn.MSELoss()(twin(inputs), targets).backward()
            sgd.step()
            average.update_parameters(twin)
    for name, param in average.module.named_parameters():
        torch.testing.assert_close(result.params[name], param, rtol=1e-5, atol=1e-6)
        assert torch.equal(model.get_parameter(name), result.params[name])
    for (name, buffer), (_, theirs) in zip(
        model.named_buffers(), twin.named_buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, theirs, msg=name)
    model.eval()
    with torch.no_grad():
        expected = nn.MSELoss()(model(val[0]), val[1]).item()
    assert result.history[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_between_epochs_the_module_holds_what_is_trained():
    model, held = net(), []
    run(
        model,
        ema=0.99,
        on_epoch=lambda record: held.append(
            torch.equal(model[0].weight, record.params["0.weight"])
        ),
    )
    assert held == [True] * 4


def test_bf16_trains_as_float32_does():
    val = tuple(data(8, seed=5).tensors)
    half, full = (run(precision=p, val=val) for p in ("bf16", "fp32"))
    for column in ("train_loss", "val_loss"):
        assert half.history[column] != full.history[column]
        assert half.history[column] == pytest.approx(full.history[column], rel=0.05)
    assert half.params["0.weight"].dtype == torch.float32
    assert "skipped" not in half.history.columns


def test_fp16_counts_the_steps_it_skips():
    """Targets so large that the first scale overflows."""
    inputs, targets = data().tensors
    train = [(inputs, 1e3 * targets)]
    result = run(
        nn.Linear(3, 1), train, precision="fp16", epochs=30, clip_grad_norm=1.0
    )
    skipped = result.history["skipped"]
    count = sum(skipped)
    assert 0 < count == int(result.opt_state.scale.skipped) < 20
    assert skipped == [1] * count + [0] * (30 - count)
    losses = result.history["train_loss"]
    assert len(set(losses[: count + 1])) == 1
    assert losses[-1] < losses[count]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": 0}, ValueError, r"fit\(max_steps=\.\.\.\) must be at least 1"),
        ({"max_steps": 1.5}, TypeError, "max_steps"),
        ({"eval_every": 0}, ValueError, "eval_every"),
        ({"max_seconds": -1}, ValueError, "max_seconds"),
        ({"on_step": 3}, TypeError, r"on_step=\.\.\.\) must be a function"),
        ({"precision": "tf32"}, ValueError, "'fp32', 'bf16' or 'fp16'"),
        ({"ema": 1.0}, ValueError, "ema"),
    ],
)
def test_options_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_a_plateau_compares_losses_of_one_kind():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
    with pytest.raises(ValueError, match="eval_every=1"):
        run(
            model,
            optimizer=sgd,
            scheduler=plateau,
            schedule_by="epoch",
            eval_every=2,
        )


# --- progress -------------------------------------------------------------------------


def test_plain_progress_is_a_line_per_epoch(capsys):
    run(epochs=2, progress="plain", val=tuple(data(8, seed=5).tensors))
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == ["1/2", "2/2"]
    assert all("val_loss" in line for line in out.splitlines())
    assert not err
    run(epochs=2)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"fit\(progress=\.\.\.\) must be True"):
        run(progress="loud")


# --- metrics --------------------------------------------------------------------------


def error(output, target):
    return (output - target).abs().flatten()


def test_metrics_are_columns():
    model, val = net(), list(DataLoader(data(10, seed=5), 4))
    result = run(
        model,
        val=val,
        metrics={"mae": ll.metrics.mean_absolute_error(), "own": error},
        frozen_train_loss=True,
        eval_every=2,
        restore_best=False,
        epochs=3,
    )
    assert {"val_mae", "val_own", "train_mae", "train_own"} <= set(
        result.history.columns
    )
    last = result.history[-1]
    for prefix, dataset in (("val_", data(10, seed=5)), ("train_", data())):
        model.eval()
        with torch.no_grad():
            gap = (model(dataset.tensors[0]) - dataset.tensors[1]).abs().mean().item()
        assert last[prefix + "mae"] == pytest.approx(gap, rel=1e-6)
        assert last[prefix + "own"] == pytest.approx(gap, rel=1e-6)
    assert result.history["val_mae"][0] is None
    plain = run(val=val, epochs=3, restore_best=False, eval_every=2)
    assert result.history["val_loss"] == plain.history["val_loss"]


def test_a_metric_can_end_a_run():
    val = tuple(data(10, seed=5).tensors)
    result = run(
        val=val,
        metrics={"zero": lambda output, target: 0 * error(output, target)},
        early_stopping=EarlyStopping(2, on="val_zero", mode="max"),
        epochs=9,
    )
    assert (result.status, len(result.history)) == ("early_stopping", 3)


def test_metrics_that_cannot_be_are_refused_before_training():
    val = tuple(data(10, seed=5).tensors)
    with pytest.raises(ValueError, match="val_loader, or frozen_train_loss"):
        run(metrics={"own": error})
    with pytest.raises(ValueError, match="scalar"):
        run(val=val, metrics={"own": lambda output, target: output.mean()})
    with pytest.raises(TypeError, match="accuracy"):
        run(val=val, metrics="accuracy")


# --- all at once ----------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """What would wait for a device; counts of steps and seeds stay on the CPU."""
    found = []

    def noted(original):
        def read(tensor, *args):
            if tensor.dtype != torch.int64 or tensor.ndim:
                found.append(original.__name__)
            return original(tensor, *args)

        return read

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    return found


def everything(count, epochs=2, **options):
    seen = []
    result = run(
        train=loader(count),
        val=list(DataLoader(data(8, seed=5), 4)),
        epochs=epochs,
        scheduler=ll.schedules.cosine(10_000),
        clip_grad_norm=1.0,
        precision="bf16",
        ema=0.9,
        metrics={"mae": ll.metrics.mean_absolute_error(), "own": error},
        early_stopping=50,
        max_steps=10_000,
        max_seconds=1e6,
        frozen_train_loss=True,
        on_step=lambda record: seen.append(record.epoch),
        on_epoch=lambda record: seen.append(record.row),
        progress="plain",
        **options,
    )
    return result, seen


def test_with_everything_on_no_step_reads_a_value(capsys, reads, monkeypatch):
    for module in (_training, _step):  # where nobody waits, the gate may look
        monkeypatch.setattr(module, "on_host", lambda device: False)
    counts = []
    for size in (8, 80):
        reads.clear()
        everything(size)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0, "it depends on the number of steps"


def test_teeth_a_step_that_reads_is_seen(reads):
    counts = []
    for size in (8, 80):
        reads.clear()
        run(train=loader(size), on_step=lambda record: record.mean.value())
        counts.append(len(reads))
    assert counts[0] < counts[1]


def test_with_everything_on_nothing_is_compiled_twice(capsys):
    before = _compile.graphs_compiled()
    result, seen = everything(24, epochs=5, compile=True)
    assert result.compiled.compiled
    # A training step, and an evaluation step.
    assert _compile.graphs_compiled() - before == 2
    assert len(seen) == 5 * 7


@pytest.mark.parametrize("streamed", [False, True])
def test_the_last_line_says_what_the_curves_say(capsys, streamed):
    """With facts about the data if they are in memory, and not read for it if not."""

    class Stream:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([tuple(data(8, seed=5).tensors)])

    val = Stream() if streamed else tuple(data(8, seed=5).tensors)
    model = net()
    result = run(model, val=val, epochs=9, progress="plain")
    *epochs, last = capsys.readouterr().out.splitlines()
    assert len(epochs) == 9
    facts = None if streamed else ll.data_facts(model, nn.MSELoss(), loader(), val)
    assert last == str(ll.diagnose(result, facts=facts))
    if streamed:
        silent = Stream()
        run(val=silent, epochs=9)
        assert val.passes == silent.passes


# --- schedules ------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, "step"])
@pytest.mark.parametrize("compile", [True, False])
def test_a_pure_schedule_is_that_of_torch(by, compile):
    """And the steps of a fold go on in one call."""
    ours = run(
        optimizer=torch.optim.Adam,
        scheduler=ll.schedules.cosine(24),
        schedule_by=by,
        compile=compile,
    )
    model = net()
    adam = torch.optim.Adam(model.parameters())
    theirs = run(
        model,
        optimizer=adam,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(adam, 24),
        schedule_by="step",
    )
    for column in ("lr", "train_loss"):
        expected = theirs.history[column]
        assert ours.history[column] == pytest.approx(expected, rel=1e-5)
    assert ours.compiled.folded == compile


def test_a_pure_schedule_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="Leave schedule_by out"):
        run(scheduler=ll.schedules.cosine(24), schedule_by="epoch")
    with pytest.raises(TypeError, match="must be a function"):
        run(scheduler=lambda step: 0.5 if step < 3 else 0.1)
    with pytest.raises(TypeError, match=r"lossloop\.schedules or a"):
        run(scheduler="cosine", schedule_by="step")
