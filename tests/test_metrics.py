"""Metrics: those of scikit-learn for any batching, inside the compiled step."""

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lossloop as ll
from lossloop._fold import fold_metrics
from lossloop.metrics import (
    Measured,
    Metric,
    accuracy,
    as_metric,
    mean_absolute_error,
    mean_squared_error,
    perplexity,
    r2,
    standard_error,
    top_k,
)

N, C = 40, 5
random = torch.Generator().manual_seed(1)
# Scores that differ from each other, so that no order of equal ones matters.
SCORES = torch.rand(N, C, generator=random, dtype=torch.float64)
LABELS = torch.randint(C, (N,), generator=random)
OUTPUT = torch.randn(N, 3, generator=random, dtype=torch.float64)
TARGET = OUTPUT + torch.randn(N, 3, generator=random, dtype=torch.float64)
WEIGHTS = torch.randint(4, (N,), generator=random)  # some are 0
LOGITS, ANSWERS = OUTPUT[:, 0], (TARGET[:, 0] > 0).long()


def _log_loss(target, scores, sample_weight):
    probabilities = scores.softmax(1).numpy()
    labels = range(C)
    loss = sk.log_loss(
        target, probabilities, labels=labels, sample_weight=sample_weight
    )
    return math.exp(loss)


# The metric, outputs, targets, and what scikit-learn says of (target, output, weights).
ORACLES = {
    "accuracy": (
        accuracy(),
        SCORES,
        LABELS,
        lambda t, o, w: sk.accuracy_score(t, o.argmax(1), sample_weight=w),
    ),
    "binary accuracy": (
        accuracy(),
        LOGITS,
        ANSWERS,
        lambda t, o, w: sk.accuracy_score(t, o > 0, sample_weight=w),
    ),
    "binary accuracy of real targets": (
        accuracy(),
        LOGITS,
        ANSWERS.double(),
        lambda t, o, w: sk.accuracy_score(t, o > 0, sample_weight=w),
    ),
    "top 2": (
        top_k(2),
        SCORES,
        LABELS,
        lambda t, o, w: sk.top_k_accuracy_score(
            t, o, k=2, labels=range(C), sample_weight=w
        ),
    ),
    "mean absolute error": (
        mean_absolute_error(),
        OUTPUT,
        TARGET,
        lambda t, o, w: sk.mean_absolute_error(t, o, sample_weight=w),
    ),
    "mean squared error": (
        mean_squared_error(),
        OUTPUT,
        TARGET,
        lambda t, o, w: sk.mean_squared_error(t, o, sample_weight=w),
    ),
    "r2": (
        r2(),
        OUTPUT,
        TARGET,
        lambda t, o, w: sk.r2_score(t, o, sample_weight=w),
    ),
    "r2 of one output": (
        r2(),
        OUTPUT[:, 0],
        TARGET[:, 0],
        lambda t, o, w: sk.r2_score(t, o, sample_weight=w),
    ),
    "perplexity": (perplexity(), SCORES, LABELS, _log_loss),
}
COUNTED = {"accuracy", "binary accuracy", "binary accuracy of real targets", "top 2"}


def zeros(output, target):
    """A loss for any output: one 0 for each sample."""
    return torch.zeros(len(output))


def step_of(metrics, loss_fn=zeros, model=None):
    goal = ll.supervised(nn.Identity() if model is None else model, loss_fn)
    return ll.make_eval_step(goal, metrics)


def measure(metrics, batches, **options):
    _, measured = fold_metrics(step_of(metrics, **options), {}, batches)
    return measured.values()


def cut(tensors, sizes):
    parts = [tensor.split(sizes) for tensor in tensors]
    return list(zip(*parts, strict=True))


@st.composite
def batchings(draw):
    """An order of the samples, and the sizes of batches."""
    order = draw(st.permutations(range(N)))
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=8)))
    return order, [b - a for a, b in itertools.pairwise([0, *cuts, N])]


# --- equal to scikit-learn ------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", ORACLES)
@given(batching=batchings())
def test_any_batching_gives_what_scikit_learn_says_of_all(name, weighted, batching):
    metric, output, target, oracle = ORACLES[name]
    order, sizes = batching
    data = [output, target, WEIGHTS][: 3 if weighted else 2]
    batches = cut([tensor[order] for tensor in data], sizes)
    expected = oracle(target, output, WEIGHTS.numpy() if weighted else None)
    value = measure({"x": metric}, batches)["x"]
    if name in COUNTED:
        assert value == expected
    else:
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_teeth_the_average_of_batches_is_not_the_metric():
    batches = cut([SCORES, LABELS], [32, 8])
    whole = sk.accuracy_score(LABELS, SCORES.argmax(1))
    parts = [measure({"x": accuracy()}, [batch])["x"] for batch in batches]
    assert sum(parts) / len(parts) != whole
    assert measure({"x": accuracy()}, batches)["x"] == whole


def test_teeth_r2_of_batches_does_not_add():
    total = r2()
    wrong = Metric(
        lambda o, t, w: (total.value(total.sums(o, t, w)) * len(o), torch.tensor(N)),
        lambda sums: sums[0] / sums[1],
    )
    batches = cut([OUTPUT, TARGET], [32, 8])
    expected = sk.r2_score(TARGET, OUTPUT)
    assert abs(measure({"x": wrong}, batches)["x"] - expected) > 1e-3
    assert abs(measure({"x": total}, batches)["x"] - expected) < 1e-12


@pytest.mark.parametrize("name", ORACLES)
def test_weight_0_is_absence_and_weight_2_is_twice(name):
    metric, output, target, _ = ORACLES[name]
    weights = torch.tensor([0, 1, 2, 1] * 10)
    kept = torch.repeat_interleave(torch.arange(N), weights)
    spoiled = output.clone()
    spoiled[weights == 0] = math.nan  # of absent samples nothing is seen
    one = measure({"x": metric}, [(spoiled, target, weights)])["x"]
    other = measure({"x": metric}, [(output[kept], target[kept])])["x"]
    if name in COUNTED:
        assert one == other
    else:
        assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize(
    "make", [accuracy, lambda i: top_k(2, i), perplexity], ids=["acc", "top", "ppl"]
)
@pytest.mark.parametrize("ignored", [-100, 3])
def test_ignored_targets_are_absent(make, ignored):
    target = LABELS.clone()
    target[::3] = ignored
    kept = target != ignored
    metric = {"x": make(ignored)}
    one = measure(metric, cut([SCORES, target], [7, 33]))["x"]
    other = measure(metric, [(SCORES[kept], target[kept])])["x"]
    assert one == pytest.approx(other, rel=1e-14)


def test_ignored_answers_of_yes_and_no_are_absent():
    target = ANSWERS.clone()
    target[::3] = -100
    kept = target != -100
    value = measure({"x": accuracy()}, [(LOGITS, target)])["x"]
    assert value == sk.accuracy_score(ANSWERS[kept], LOGITS[kept] > 0)


def test_every_token_of_a_sequence_counts():
    scores = SCORES.reshape(8, 5, C).movedim(-1, 1)  # N x C x T
    labels = LABELS.reshape(8, 5).clone()
    labels[:, 3:] = -100
    flat, ids = scores.movedim(1, -1).reshape(-1, C), labels.flatten()
    metrics = {"acc": accuracy(), "top": top_k(3), "ppl": perplexity()}
    assert measure(metrics, cut([scores, labels], [5, 3])) == pytest.approx(
        measure(metrics, [(flat, ids)]), rel=1e-14
    )
    weights = torch.arange(8)
    assert measure(metrics, cut([scores, labels, weights], [5, 3])) == pytest.approx(
        measure(metrics, [(flat, ids, weights.repeat_interleave(5))]), rel=1e-14
    )


def test_perplexity_is_the_exponential_of_the_loss_of_the_same_pass():
    step = step_of({"x": perplexity()}, nn.CrossEntropyLoss())
    mean, measured = fold_metrics(step, {}, cut([SCORES.float(), LABELS], [11, 29]))
    assert measured.values()["x"] == pytest.approx(math.exp(mean.value()), rel=1e-15)


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ([0.1] * 7, [0.1] * 7),  # whose sums of squares do not cancel exactly
        ([0.3] * 7, [0.1] * 7),
        ([0.1] * 6 + [0.2], [0.1] * 7),
        ([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]], [[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]]),
        ([1000.1, 1000.2, 1000.4], [1000.1, 1000.2, 1000.3]),
    ],
    ids=["exact", "wrong", "one wrong", "one of two", "far from zero"],
)
def test_r2_of_a_constant_target_is_that_of_scikit_learn(output, target):
    o, t = (torch.tensor(each, dtype=torch.float64) for each in (output, target))
    # Exact there: a constant minus its mean may not be 0 in scikit-learn either.
    centred = np.asarray(target) - np.asarray(target)[0]
    expected = sk.r2_score(centred, centred + np.asarray(output) - np.asarray(target))
    value = measure({"x": r2()}, cut([o, t], [2, len(t) - 2]))["x"]
    assert value == pytest.approx(expected, rel=1e-6)


# --- functions, losses, records of one's own ------------------------------------------


def test_a_function_of_samples_and_a_pair_are_metrics():
    def near(output, target):
        return (output - target).abs().mean(1) < 0.7

    def pair(output, target):
        hits = near(output, target)
        return hits.sum(), len(hits)

    expected = near(OUTPUT, TARGET).double().mean().item()
    batches = cut([OUTPUT, TARGET], [3, 30, 7])
    assert measure({"near": near, "pair": pair}, batches) == {
        "near": expected,
        "pair": expected,
    }
    weighted = cut([OUTPUT, TARGET, WEIGHTS], [3, 30, 7])
    hits, weights = near(OUTPUT, TARGET).numpy(), WEIGHTS.numpy()
    expected = np.average(hits, weights=weights)
    assert measure({"near": near}, weighted)["near"] == expected
    with pytest.raises(ValueError, match=r"metrics\['pair'\]: pair: the batch holds"):
        measure({"pair": pair}, weighted)


def test_a_loss_of_torch_is_a_metric():
    metrics = {"huber": nn.HuberLoss(), "mae": nn.L1Loss(reduction="sum")}
    batches = cut([OUTPUT, TARGET], [3, 30, 7])
    assert measure(metrics, batches) == pytest.approx(
        {
            "huber": nn.HuberLoss()(OUTPUT, TARGET).item(),
            "mae": nn.L1Loss()(OUTPUT, TARGET).item(),
        },
        rel=1e-14,
    )


def test_a_metric_of_several_sums_of_any_shape():
    def sums(output, target, weights):
        found, there = output.argmax(1), target
        table = nn.functional.one_hot(there, C).T @ nn.functional.one_hot(found, C)
        return table, target.new_tensor(len(target))

    def macro_recall(totals):
        table, _ = totals
        return (table.diagonal() / table.sum(1)).mean()

    step = ll.compile_step(
        step_of({"x": Metric(sums, macro_recall)}), backend="aot_eager"
    )
    _, measured = fold_metrics(step, {}, cut([SCORES, LABELS], [1, 20, 19]))
    expected = sk.recall_score(LABELS, SCORES.argmax(1), average="macro")
    assert measured.values()["x"] == pytest.approx(expected, rel=1e-15)


def test_sums_are_added_in_float64():
    def thirds(output, target, weights):
        return torch.full((), 2.0**24), torch.tensor(1)

    step = step_of({"x": Metric(thirds, lambda totals: totals[0] + 1)})
    _, _, sums = step({}, (SCORES, LABELS))
    assert [each.dtype for each in sums["x"]] == [torch.float64] * 2
    _, measured = fold_metrics(step, {}, [(SCORES, LABELS)] * 3)
    assert measured.values()["x"] == 3 * 2**24 + 1  # float32 has no such number


# --- the step -------------------------------------------------------------------------


class Counting(nn.Module):
    """Scores of classes; notes every call."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, C)
        self.dropout = nn.Dropout()

    def forward(self, x):
        Counting.calls += 1
        return self.dropout(self.layer(x))


METRICS = {"acc": accuracy(), "top": top_k(2), "ppl": perplexity()}
INPUTS = [OUTPUT.float(), LABELS]


def supervised_step(metrics=METRICS):
    goal = ll.supervised(Counting(), nn.CrossEntropyLoss())
    return goal, ll.make_eval_step(goal, metrics)


def test_the_model_is_called_once_and_the_loss_is_that_without_metrics():
    goal, step = supervised_step()
    params = goal.init()
    Counting.calls = 0
    loss_sum, n, sums = step(params, tuple(INPUTS))
    assert Counting.calls == 1
    assert list(sums) == list(METRICS)
    expected = ll.make_eval_step(goal)(params, tuple(INPUTS))
    assert torch.equal(loss_sum, expected[0])
    assert torch.equal(n, expected[1])
    batches = cut(INPUTS, [13, 13, 14])
    mean, _ = fold_metrics(step, params, batches)
    assert mean == ll.fold_eval(step, params, batches)
    assert mean == ll.fold_eval(ll.make_eval_step(goal), params, batches)


def test_without_metrics_the_step_returns_a_pair():
    for metrics in (None, {}):
        goal, step = supervised_step(metrics)
        assert len(step(goal.init(), tuple(INPUTS))) == 2
        mean, measured = fold_metrics(step, goal.init(), [tuple(INPUTS)])
        assert measured.values() == {}
        assert mean == ll.fold_eval(step, goal.init(), [tuple(INPUTS)])


def test_compiled_is_one_graph_for_each_shape_and_gives_the_same():
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=C)
    goal, step = supervised_step(METRICS | {"near": lambda o, t: o[:, 0], "f1": f1})
    params = goal.init()
    compiled = ll.compile_step(step, backend="aot_eager")
    batches = cut(INPUTS, [16, 16, 8])
    mean, measured = fold_metrics(compiled, params, batches)
    assert compiled.body.compilations == 2
    assert compiled.metrics is step.metrics
    eager_mean, eager = fold_metrics(step, params, batches)
    assert mean.value() == pytest.approx(eager_mean.value(), rel=1e-6)
    assert measured.values() == pytest.approx(eager.values(), rel=1e-6)
    assert measured.values()["acc"] == eager.values()["acc"]
    fold_metrics(compiled, params, batches)
    assert compiled.body.compilations == 2


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", ORACLES)
def test_every_metric_compiles_to_the_same(name, weighted):
    metric, output, target, _ = ORACLES[name]
    step = step_of({"x": metric})
    compiled = ll.compile_step(step, backend="aot_eager")
    batch = (output, target, WEIGHTS)[: 3 if weighted else 2]
    expected, sums = step({}, batch)[2]["x"], compiled({}, batch)[2]["x"]
    torch.testing.assert_close(sums, expected, rtol=1e-15, atol=0)


def test_half_precision_is_measured_too():
    goal, _ = supervised_step()
    metrics = METRICS | {"mean": lambda o, t: o.mean(1)}
    step = ll.make_eval_step(goal, metrics, precision="bf16")
    _, measured = fold_metrics(step, goal.init(), [tuple(INPUTS)])
    full = ll.make_eval_step(goal, metrics)
    _, expected = fold_metrics(full, goal.init(), [tuple(INPUTS)])
    assert measured.values()["ppl"] == pytest.approx(expected.values()["ppl"], rel=0.02)


class NoReads(TorchDispatchMode):
    """Refuses to read a value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ORACLES)
def test_the_fold_reads_nothing(name):
    metric, output, target, _ = ORACLES[name]
    with NoReads():
        step = step_of({"x": metric})
        fold_metrics(step, {}, cut([output, target, WEIGHTS], [16, 24]))


def test_teeth_a_read_is_seen():
    with pytest.raises(AssertionError), NoReads():
        measure({"x": lambda o, t: o[:, 0] * o.max().item()}, [(SCORES, LABELS)])


# --- torchmetrics ---------------------------------------------------------------------


@given(batching=batchings())
def test_objects_of_torchmetrics_are_updated_with_every_batch(batching):
    order, sizes = batching
    f1 = torchmetrics.classification.MulticlassF1Score(C)
    right = {"f1": f1, "acc": accuracy()}
    batches = cut([SCORES[order], LABELS[order]], sizes)
    values = measure(right, batches)
    assert measure(right, batches) == values  # it is reset in between
    once = torchmetrics.classification.MulticlassF1Score(C)
    once.update(SCORES, LABELS)
    assert values["f1"] == once.compute().item()
    assert list(values) == ["f1", "acc"]


def test_the_mean_squared_error_of_torchmetrics_is_ours():
    theirs = torchmetrics.MeanSquaredError().set_dtype(torch.float64)
    metrics = {"theirs": theirs, "ours": mean_squared_error()}
    values = measure(metrics, cut([OUTPUT, TARGET], [5, 5, 30]))
    assert values["theirs"] == pytest.approx(values["ours"], rel=1e-14)


def test_objects_of_torchmetrics_take_no_weights():
    metrics = {"mse": torchmetrics.MeanSquaredError()}
    for step in (step_of(metrics), ll.compile_step(step_of(metrics), backend="eager")):
        with pytest.raises(ValueError, match=r"metrics\['mse'\]: the batch holds wei"):
            fold_metrics(step, {}, [(OUTPUT, TARGET, WEIGHTS)])


def test_a_metric_of_torchmetrics_is_one_number():
    each = torchmetrics.classification.MulticlassF1Score(C, average=None)
    _, measured = fold_metrics(step_of({"f1": each}), {}, [(SCORES, LABELS)])
    with pytest.raises(ValueError, match=r"metrics\['f1'\] gives .* shape \(5,\)"):
        measured.values()
    both = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])
    with pytest.raises(TypeError, match=r"metrics\['x'\] is a MetricCollection"):
        step_of({"x": both})


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (accuracy, r"metrics\['x'\] is the function .* Call it: accuracy\(\)\."),
        (top_k, r"Call it: top_k\(5\)\."),
        ("accuracy", r"is the string 'accuracy'\. Pass one of .*, top_k\(5\), "),
        (3, r"metrics\['x'\]: loss_fn is int, which cannot be called"),
        (nn.L1Loss, r"metrics\['x'\]: loss_fn is the class L1Loss"),
        (torchmetrics.MeanSquaredError, r"is the class MeanSquaredError"),
    ],
)
def test_what_is_no_metric_is_refused(metric, message):
    with pytest.raises(TypeError, match=message):
        step_of({"x": metric})
    with pytest.raises(TypeError, match=message):
        as_metric("x", metric)


@pytest.mark.parametrize("name", ["loss", "top 5", "", 3])
def test_a_name_that_is_no_column_is_refused(name):
    with pytest.raises(ValueError, match=r"make_eval_step\(metrics=\.\.\.\): "):
        step_of({name: accuracy()})


def test_metrics_have_names():
    with pytest.raises(TypeError, match="must be a mapping of names to metrics"):
        step_of([accuracy()])


@pytest.mark.parametrize("k", [0, -1, True, 2.0, None])
def test_a_k_that_counts_nothing_is_refused(k):
    with pytest.raises(ValueError, match=r"top_k\(k=\.\.\.\) must be an int of at l"):
        top_k(k)


@pytest.mark.parametrize(
    ("metric", "batch", "error", "message"),
    [
        (
            lambda o, t: (o.argmax(1) == t).float().mean(),
            (SCORES, LABELS),
            ValueError,
            r"metrics\['x'\]: <lambda>: returned a scalar\. .*one loss per sample",
        ),
        (
            lambda o, t: o - t,
            (LOGITS.unsqueeze(1), LOGITS),
            ValueError,
            r"metrics\['x'\]: .* they were broadcast",
        ),
        (
            accuracy(),
            (LOGITS.unsqueeze(1), ANSWERS),
            ValueError,
            r"metrics\['x'\]: accuracy: .* take output\.squeeze\(1\)",
        ),
        (
            accuracy(),
            (SCORES.reshape(8, 5, C), LABELS.reshape(8, 5)[:, :4]),
            ValueError,
            r"metrics\['x'\]: accuracy: output has shape \(8, 5, 5\)",
        ),
        (
            accuracy(),
            (SCORES, LABELS.float()),
            TypeError,
            r"metrics\['x'\]: accuracy: target is torch\.float32; .* target\.long\(\)",
        ),
        (
            accuracy(),
            (SCORES, {"label": LABELS}),
            TypeError,
            r"accuracy: target is dict, not a tensor",
        ),
        (
            top_k(5),
            (SCORES, LABELS),
            ValueError,
            r"metrics\['x'\]: top_k: of 5 classes, the target is always among 5",
        ),
        (
            r2(),
            (LOGITS.unsqueeze(1), LOGITS),
            ValueError,
            r"metrics\['x'\]: r2: .* Use output\.squeeze\(-1\)",
        ),
        (
            mean_squared_error(),
            (LOGITS.unsqueeze(1), LOGITS),
            ValueError,
            r"metrics\['x'\]: MSELoss: .* Use output\.squeeze\(-1\)",
        ),
        (
            Metric(lambda o, t, w: o.sum(), lambda sums: sums[0]),
            (SCORES, LABELS),
            TypeError,
            r"metrics\['x'\]: sums must return a tuple of tensors",
        ),
        (
            Metric(lambda o, t, w: (o.sum(), len(o)), lambda sums: sums[0]),
            (SCORES, LABELS),
            TypeError,
            r"metrics\['x'\]: sums must return a tuple of tensors",
        ),
    ],
    ids=[
        "mean",
        "broadcast",
        "one class",
        "shape",
        "real labels",
        "no tensor",
        "k",
        "r2 broadcast",
        "mse broadcast",
        "no tuple",
        "no tensors",
    ],
)
def test_what_a_step_refuses_names_the_metric(metric, batch, error, message):
    with pytest.raises(error, match=message):
        measure({"x": metric}, [batch])


def test_the_error_of_a_function_is_its_own():
    def broken(output, target):
        raise KeyError("column")

    with pytest.raises(KeyError, match="column"):
        measure({"x": broken}, [(SCORES, LABELS)])


@pytest.mark.parametrize("name", ORACLES)
def test_a_metric_of_nothing_is_refused_by_name(name):
    metric, output, target, _ = ORACLES[name]
    with pytest.raises(ValueError, match=r"metrics\['x'\] of no data is undefined"):
        measure({"x": metric}, [(output, target, torch.zeros(N))])


def test_a_metric_that_is_nan_is_no_error():
    assert math.isnan(
        measure({"x": mean_absolute_error()}, [(OUTPUT * math.nan, TARGET)])["x"]
    )


def test_a_result_is_one_number():
    each = Metric(lambda o, t, w: (o.sum(0), torch.tensor(N)), lambda sums: sums[0])
    with pytest.raises(ValueError, match=r"metrics\['x'\] gives Tensor of shape"):
        measure({"x": each}, [(SCORES, LABELS)])
    with pytest.raises(ValueError, match=r"metrics\['x'\] gives int of shape \(\)"):
        Measured({"x": 3}, {}).values()


def test_metrics_need_the_output_of_a_supervised_objective():
    def own(model, batch):
        return model(batch).sum(), len(batch)

    for goal in (ll.objective(nn.Linear(3, 1), own), lambda params, batch: None):
        with pytest.raises(TypeError, match=r"which an objective of your own does no"):
            ll.make_eval_step(goal, METRICS)


def test_the_fold_takes_steps_that_know_their_metrics():
    with pytest.raises(TypeError, match=r"Make it with make_eval_step\(objective, met"):
        fold_metrics(lambda params, batch: None, {}, [(SCORES, LABELS)])
    with pytest.raises(ValueError, match="batches"):
        fold_metrics(step_of(METRICS), {}, [])


# --- the standard error ---------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[23], [10, 10, 3], [1] * 23])
def test_the_standard_error_is_that_of_a_ratio(sizes, weighted):
    """By the definition, from the losses of samples that torch gives."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(23, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 4, (23,), generator=draw)
    labels[3] = -100
    weights = torch.rand(23, generator=draw, dtype=torch.float64) if weighted else None
    class_weights = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=class_weights)
    error = standard_error(loss_fn)
    parts = [
        error.sums(*(None if t is None else t for t in batch))
        for batch in zip(
            scores.split(sizes),
            labels.split(sizes),
            [None] * len(sizes) if weights is None else weights.split(sizes),
            strict=True,
        )
    ]
    totals = tuple(map(sum, zip(*parts, strict=True)))
    s = nn.CrossEntropyLoss(weight=class_weights, reduction="none")(scores, labels)
    n = class_weights[labels.clamp(min=0)] * (labels != -100)
    if weights is not None:
        s, n = s * weights, n * weights
    apart = s - s.sum() / n.sum() * n
    expected = (22 / 21 * (apart**2).sum()).sqrt() / n.sum()
    torch.testing.assert_close(error.value(totals), expected, rtol=1e-12, atol=0)


def test_equal_weights_give_the_usual_standard_error():
    output, target = torch.randn(50, 1).double(), torch.zeros(50, 1).double()
    error = standard_error(nn.MSELoss())
    found = error.value(error.sums(output, target, None))
    expected = (output**2).std() / 50**0.5
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    alone = error.value(error.sums(output[:1], target[:1], None))
    assert alone == math.inf


def test_the_standard_error_compiles_with_the_loss():
    goal = ll.supervised(nn.Linear(3, 2), nn.CrossEntropyLoss())
    named = {"se": standard_error(nn.CrossEntropyLoss())}
    eager = ll.make_eval_step(goal, named)
    compiled = ll.compile_step(ll.make_eval_step(goal, named), backend="aot_eager")
    batch = torch.randn(6, 3), torch.randint(0, 2, (6,))
    for one, other in zip(
        eager(goal.init(), batch)[2]["se"],
        compiled(goal.init(), batch)[2]["se"],
        strict=True,
    ):
        torch.testing.assert_close(one, other)
