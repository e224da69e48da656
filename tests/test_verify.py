"""The report: all laws at once, in words; bad input; the command."""

import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import CASES, mlp
from test_laws import (
    CLASSES,
    IGNORED,
    LINE,
    START,
    accumulating,
    contrastive,
    counts_ignored,
    descend,
    divided_once,
    goal,
    mean_of_means,
    per_sample,
    squares,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import testing
from lossloop.__main__ import main
from lossloop.testing import (
    LawBrokenError,
    check_accumulation,
    check_compiled_matches_eager,
    check_determinism,
    check_matches_torch_loop,
    check_partition_invariance,
    check_zero_weight_is_absence,
    verify,
)

QUICK = {"examples": 10, "backend": "aot_eager"}
LAWS = [
    "partition invariance",
    "order invariance",
    "zero weight is absence",
    "gradients",
    "accumulation",
    "the torch loop",
    "purity",
    "determinism",
    "compiled = eager",
    "no recompilation",
]


def results(report):
    return {row.law: row.result for row in report.rows}


def reasons(report):
    return {row.law: row.reason for row in report.rows if row.reason}


# --- the report -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_report():
    return verify(goal(mean_of_means), CLASSES, **QUICK)


def test_a_right_objective():
    subject = ll.supervised(CASES["conv_net"].model(), CASES["conv_net"].loss)
    report = verify(subject, CASES["conv_net"].batch(10), **QUICK)
    assert results(report) == dict.fromkeys(LAWS, "held"), str(report)
    assert report.held
    for row in report.rows:
        assert 0 <= row.difference <= row.tolerance < 1e-3
        assert row.origin
        assert row.counterexample == row.reason == ""
    assert "10 held, 0 broken, 0 not checked." in str(report)


def test_a_wrong_objective(wrong_report):
    report = wrong_report
    assert not report.held
    broken = [row for row in report.rows if row.result == "broken"]
    assert [row.law for row in broken] == ["partition invariance", "accumulation"]
    assert "samples [0, 1] in one batch: loss_sum " in broken[0].counterexample
    assert "loss_sum looks like a mean" in broken[0].cause
    assert "losses.sum()" in broken[0].remedy
    assert list(reasons(report)) == ["zero weight is absence"]
    assert "with_weights" in reasons(report)["zero weight is absence"]
    text = " ".join(str(report).split())
    assert "BROKEN: partition invariance" in text
    assert f"Counterexample: {broken[0].counterexample}" in text
    assert "7 held, 2 broken, 1 not checked." in text


def test_the_report_fits_and_needs_no_knowledge_of_the_tools(wrong_report):
    for report in (wrong_report, verify(descend, LINE, **START, **QUICK)):
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= 100
        assert not any(
            word in str(report).lower()
            for word in ("hypothesis", "falsifying", "traceback", "strategy", "shrink")
        )
        assert all(line == line.rstrip() for line in lines)


def test_a_step_of_nobodys_library():
    report = verify(descend, LINE, **START, **QUICK)
    assert report.held
    assert set(reasons(report)) == {
        "zero weight is absence",
        "gradients",
        "accumulation",
        "the torch loop",
    }
    report = verify(
        descend,
        LINE,
        **START,
        **QUICK,
        accumulated=lambda k: accumulating(k, divided_once),
    )
    assert results(report)["accumulation"] == "broken"  # descend has momentum


def test_a_plain_function_and_an_eval_step():
    report = verify(squares, LINE, params=START["params"], **QUICK)
    assert set(reasons(report)) == {"zero weight is absence"}
    assert report.held
    subject = ll.supervised(mlp(), nn.CrossEntropyLoss())
    report = verify(ll.make_eval_step(subject), CLASSES, params=subject.init(), **QUICK)
    assert set(results(report).values()) == {"held", "not checked"}
    assert results(report)["purity"] == results(report)["compiled = eager"] == "held"


def test_what_is_passed_on():
    report = verify(
        ll.supervised(mlp(), counts_ignored),
        IGNORED,
        optimizer=torch.optim.Adam,
        with_weights=lambda batch, weights: batch,
        accumulated=lambda k: ll.make_step(RIGHT, torch.optim.Adam),
        loss_fn=nn.CrossEntropyLoss(),
        **QUICK,
    )
    broken = {law for law, result in results(report).items() if result == "broken"}
    assert broken == {"zero weight is absence", "accumulation", "the torch loop"}


def test_a_law_that_fails_does_not_stop_the_others():
    class Old(torch.autograd.Function):
        """Without setup_context, so that torch.func refuses it."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope

    def old(model, batch):
        losses = Old.apply(per_sample(model, batch))
        return losses.sum(), len(losses)

    report = verify(goal(old), CLASSES, **QUICK)
    assert results(report)["partition invariance"] == "held"
    assert results(report)["purity"] == "not checked"
    assert "setup_context" in reasons(report)["purity"]
    assert "setup_context" in reasons(report)["gradients"]


def test_what_is_not_deterministic_is_judged_by_the_laws_that_say_so():
    def noisy(model, batch):
        return per_sample(model, batch).sum() * np.random.rand(), len(batch[1])

    report = verify(goal(noisy), CLASSES, **QUICK)
    assert results(report)["determinism"] == results(report)["purity"] == "broken"
    assert "not deterministic" in reasons(report)["partition invariance"]
    assert not report.held


@pytest.mark.slow
def test_it_takes_less_than_a_minute(tmp_path, monkeypatch):
    """With the code generator, and nothing in its cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    begin = os.times()
    report = verify(
        ll.supervised(CASES["conv_net"].model(), CASES["conv_net"].loss),
        CASES["conv_net"].batch(16),
        factory="test_verify:right",
    )
    assert report.held, str(report)
    # Of the processor, the compiler's included: others may be using it too.
    used = [after - before for after, before in zip(os.times(), begin, strict=True)]
    assert sum(used[:4]) < 60


# --- data -----------------------------------------------------------------------------


def test_data_in_other_forms():
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    loader = DataLoader(TensorDataset(x, y), 3, shuffle=True)
    subject = ll.supervised(mlp(), nn.CrossEntropyLoss())
    state = torch.get_rng_state()
    for data in (loader, [(x[:1], y[:1]), (x[1:9], y[1:9])], (x, y), [[x, y]]):
        check_partition_invariance(subject, data, examples=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_without_dimensions_belong_to_all_samples():
    def sharpened(model, batch):
        losses = cross_entropy(
            model(batch["x"]) / batch["temperature"], batch["y"], reduction="none"
        )
        return losses.sum(), len(losses)

    data = {"x": CLASSES[0], "y": CLASSES[1], "temperature": torch.tensor(2.0)}
    check_partition_invariance(goal(sharpened), data, examples=5)
    check_partition_invariance(goal(sharpened), [data, data], examples=5)


def test_few_samples_are_enough():
    assert verify(RIGHT, CASES["mlp"].batch(2), **QUICK).held


def test_a_loss_alone():
    alone = ll.supervised(nn.Identity(), nn.CrossEntropyLoss())
    report = verify(alone, (X[:, :3], Y), **QUICK)
    assert report.held
    assert results(report)["zero weight is absence"] == "held"
    assert set(reasons(report)) == {"gradients", "accumulation", "the torch loop"}
    assert "nothing to train" in reasons(report)["gradients"]


def test_statistics_of_a_sample_alone_are_no_excuse():
    model = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.InstanceNorm1d(1), nn.Flatten())
    params, wrong = mean_step(nn.Sequential(model, nn.Linear(5, 3)))
    with pytest.raises(LawBrokenError, match="looks like a mean"):
        check_partition_invariance(wrong, CLASSES, params=params, opt_state=())


def mean_step(model):
    def step(params, opt_state, batch):
        loss = cross_entropy(
            torch.func.functional_call(model, params, batch[0]), batch[1]
        )
        return params, opt_state, loss.detach(), len(batch[1])

    return {k: t.detach() for k, t in model.state_dict().items()}, step


# --- bad input ------------------------------------------------------------------------

X, Y = CLASSES
RIGHT = ll.supervised(mlp(), nn.CrossEntropyLoss())
PARAMS, OPT_STATE = ll.init(RIGHT, torch.optim.SGD)
STEP = ll.make_step(RIGHT, torch.optim.SGD)


def returning(*values):
    return lambda params, opt_state, batch: values


@pytest.mark.parametrize(
    ("subject", "data", "options", "error", "words"),
    [
        (RIGHT, (X[:1], Y[:1]), {}, ValueError, "1 sample, which cannot be split"),
        (RIGHT, (X, Y[:5]), {}, ValueError, "do not share their first dimension"),
        (RIGHT, (X.numpy(), Y), {}, TypeError, "ndarray.*Make it a tensor"),
        (RIGHT, (X, "labels"), {}, TypeError, r"batch\[1\] is a str"),
        (RIGHT, [], {}, ValueError, "no batches"),
        (RIGHT, [X, Y], {}, ValueError, "list of tensors that differ.*pass a tuple"),
        (RIGHT, TensorDataset(X, Y), {}, TypeError, "gives samples, not batches"),
        (RIGHT, (X * torch.inf, Y), {}, ValueError, "nan.*both are finite"),
        (RIGHT, (X, Y * 0 - 100), {}, ValueError, "needs a positive weight"),
        (RIGHT, (X, Y, X), {}, ValueError, "give one weight to each sample"),
        (mlp(), CLASSES, {}, TypeError, "must be a function .* got Sequential"),
        (squares, LINE, {}, ValueError, "plain function needs params"),
        (3, LINE, {}, TypeError, "got int"),
        (
            goal(lambda model, batch: per_sample(model, batch).mean()),
            CLASSES,
            {},
            TypeError,
            r"returned a Tensor of shape \(\). Return the pair .* never a mean",
        ),
        (
            lambda batch: None,
            LINE,
            {"params": PARAMS},
            TypeError,
            r"takes \(batch\), and is to be called as \(params, batch\)",
        ),
        (STEP, CLASSES, {}, ValueError, "needs the state to start from"),
        (
            descend,
            LINE,
            {"params": PARAMS},
            TypeError,
            "like a step .* pass params=... and opt_state=... too",
        ),
        (
            STEP,
            CLASSES,
            {"params": PARAMS},
            ValueError,
            "needs the state to start from",
        ),
        (squares, LINE, START, TypeError, r"called as \(params, opt_state, batch\)"),
        ("step", LINE, START, TypeError, "is a str, which cannot be called"),
        (returning(1, 2, 3), LINE, START, TypeError, "returned a tuple of length 3"),
        (
            returning({"v": X}, {}, X.sum(), 8),
            LINE,
            START,
            ValueError,
            r"given params\['v'\] as nothing, and returned \(8, 5\)",
        ),
        (
            returning({"w": X}, {}, X.sum(), 8),
            LINE,
            START,
            ValueError,
            r"given params\['w'\] as \(\) of torch.float32, and returned \(8, 5\)",
        ),
        (
            returning({"w": torch.zeros(()).double()}, {}, X.sum(), 8),
            LINE,
            START,
            ValueError,
            "torch.float32, and returned .* of torch.float64",
        ),
        (returning(START["params"], {}, X, 8), LINE, START, ValueError, "one number"),
        (
            returning(START["params"], {}, "3", 8),
            LINE,
            START,
            TypeError,
            r"\(str, int\)",
        ),
    ],
)
def test_bad_input_is_refused_at_the_door(subject, data, options, error, words):
    with pytest.raises(error, match=f"(?s)^verify: .*{words}"):
        verify(subject, data, **options)


def test_the_number_of_examples_is_positive():
    with pytest.raises(ValueError, match="examples must be an int of at least 1, got"):
        verify(RIGHT, CLASSES, examples=0)


def test_errors_of_the_subject_itself_keep_their_kind():
    def broken(model, batch):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column") as caught:
        verify(goal(broken), CLASSES)
    assert "verify looked at" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (
            lambda: check_accumulation(descend, LINE, **START),
            "nobody says how the step is made for micro-batches",
        ),
        (
            lambda: check_matches_torch_loop(descend, LINE, **START),
            "the step has no model",
        ),
        (
            lambda: check_matches_torch_loop(
                RIGHT, CLASSES, optimizer=ll.optim.SGD(lr=0.1)
            ),
            "no optimizer of torch.optim",
        ),
        (
            lambda: check_matches_torch_loop(RIGHT, CLASSES, loss_fn=nn.NLLLoss2d),
            "the loop raises",
        ),
        (
            lambda: check_zero_weight_is_absence(goal(mean_of_means), CLASSES),
            "Pass with_weights",
        ),
        (
            lambda: check_zero_weight_is_absence(
                ll.supervised(mlp(), counts_ignored), CLASSES
            ),
            "takes no batches with weights",
        ),
        (
            lambda: check_determinism(RIGHT, CLASSES, factory=lambda: None),
            "at the top of a module",
        ),
        (
            lambda: check_determinism(
                RIGHT, CLASSES, factory="test_verify:unseeded", examples=1
            ),
            "makes other params or other data",
        ),
    ],
)
def test_what_cannot_be_judged_says_why(check, words):
    with pytest.raises(ValueError, match=words):
        check()


def drawing(output, target):
    noise = torch.randn_like(output)
    return cross_entropy(output + noise, target, reduction="none")


def penalised(model, batch):
    penalty = sum((p**2).sum() for p in model.parameters())
    return per_sample(model, batch).sum() + 0.01 * penalty, len(batch[1])


@pytest.mark.parametrize(
    ("subject", "cause"),
    [
        (ll.supervised(mlp(), drawing), r"In eval mode, random .* \(randn_like\)"),
        (goal(penalised), "added once per batch, whatever is in it"),
        (goal(mean_of_means), "looks like a mean"),
        (goal(contrastive), "samples are compared"),
    ],
)
def test_the_cause_is_the_one_at_hand(subject, cause):
    with pytest.raises(LawBrokenError) as caught:
        check_partition_invariance(subject, CLASSES)
    assert re.search(cause, caught.value.cause)


def test_what_was_not_looked_at_is_said():
    report = verify(ll.supervised(mlp(), counts_ignored), (X, Y), backend="aot_eager")
    (note,) = (row.note for row in report.rows if row.note)
    assert "nothing about the mean. Pass loss_fn=" in note
    assert f"the torch loop: {note[:20]}" in str(report)
    data = X.repeat(10, 1), Y.repeat(10)
    many = verify(RIGHT, data, backend="aot_eager", examples=1)
    assert "on the first 32 samples" in str(many)
    assert not any(row.note for row in many.rows)


def test_a_step_that_is_compiled_at_each_call_is_not_judged():
    calls = []

    def counting(params, state, batch):
        calls.append(1)
        return descend(params, state, batch, rate=0.1 + 0 * len(calls))

    with pytest.raises(ValueError, match="a number of Python changes"):
        check_compiled_matches_eager(counting, LINE, **START, backend="aot_eager")


# --- the command ----------------------------------------------------------------------


def right():
    return {"subject": squares, "data": LINE, "params": START["params"]}


def wrong():
    def mean(params, batch):
        loss_sum, n = squares(params, batch)
        return loss_sum / n, 1

    return {**right(), "subject": mean, "factory": None}


def unseeded():
    generator = np.random.default_rng()
    return ll.supervised(mlp(), nn.CrossEntropyLoss()), (
        torch.from_numpy(generator.normal(size=X.shape)).float(),
        Y,
    )


def takes(argument):
    return argument


def returns_one():
    return 1


def returns_three():
    return 1, 2, 3


def returns_no_data():
    return {"subject": RIGHT, "batch": CLASSES}


def few():
    return RIGHT, (X[:1], Y[:1])


def fails():
    raise KeyError("no such file")


def ends():
    sys.exit("no data")


NUMBER = 3
COMMAND = [sys.executable, "-m", "lossloop", "verify"]


def test_the_command(tmp_path, capsys):
    """As a new user runs it, in a folder of their own."""
    (tmp_path / "check.py").write_text("from test_verify import right\n")
    options = ["--backend", "aot_eager", "--examples", "10"]
    done = subprocess.run(
        [*COMMAND, "check:right", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "9 held, 0 broken, 1 not checked." in done.stdout
    assert done.stderr == ""
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {"__pycache__"} == {"check.py"}
    assert main(["verify", "test_verify:wrong", *options]) == 1
    assert "BROKEN: partition invariance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train", "'train' is not of the form module:function"),
        (":check", "is not of the form"),
        ("nowhere:check", "there is no module nowhere"),
        ("os.nowhere:check", "there is no module os.nowhere"),
        ("broken_import:check", "importing broken_import raised ModuleNotFoundError"),
        ("test_verify:nothing", "test_verify has no function nothing"),
        ("test_verify:NUMBER", "NUMBER is a int, not a function"),
        ("test_verify:takes", r"takes takes (argument)"),
        ("test_verify:returns_one", "returned a int"),
        ("test_verify:returns_three", "returned a tuple of length 3"),
        ("test_verify:returns_no_data", "['batch', 'subject'], without subject or"),
        ("test_verify:few", "1 sample, which cannot be split"),
        ("test_verify:ends", "ends the program: SystemExit(no data)"),
        ("./train.py:check", "names a file. Give the module, as in train:check"),
    ],
)
def test_what_the_command_cannot_read(text, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_import.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["verify", text])
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_errors_of_the_factory_are_shown_and_are_no_verdict(capsys):
    assert main(["verify", "test_verify:fails"]) == 2
    assert "KeyError: 'no such file'" in capsys.readouterr().err


def test_without_hypothesis_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install 'lossloop\[testing\]'"):
        importlib.reload(testing)
