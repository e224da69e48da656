"""The benchmark: it times what it says, after having seen the same losses."""

import sys
from functools import partial

import pytest
import torch
from cases import CASES, mlp
from torch import nn

import lossloop as ll
from lossloop import benchmark
from lossloop.__main__ import main
from lossloop._works import works
from lossloop.benchmark import compare, time_works

BATCH = CASES["mlp"].batch(8)
QUICK = {"rounds": 2, "backend": "aot_eager"}


@pytest.fixture(scope="module")
def found():
    """Of a model and an optimizer, which stay as they were."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    before = {k: t.clone() for k, t in model.state_dict().items()}
    result = compare(model, nn.CrossEntropyLoss(), optimizer, BATCH, **QUICK)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert not optimizer.state
    return result


def test_all_forms_are_timed(found):
    names = [form.name for form in found.forms]
    assert names == ["by hand", "eager", "compiled", "donating", "folded"]
    by_hand, eager, compiled, donating, _ = found.forms
    for form in found.forms:
        assert 0 < form.low <= form.microseconds <= form.high
        assert form.speed == by_hand.microseconds / form.microseconds
        assert form.recompilations == 0
    assert by_hand.cold is eager.cold is by_hand.break_even is None
    assert compiled.cold > 0 < compiled.warm
    params = sum(p.numel() for p in mlp().parameters()) * 4
    assert compiled.peak >= donating.peak > params


def test_the_table_and_the_frame(found, monkeypatch):
    lines = str(found).splitlines()
    assert torch.__version__ in lines[0]
    names = [form.name for form in found.forms]
    assert [line[:10].strip() for line in lines[2:]] == names
    axes = found.plot()
    assert axes.get_yticklabels()[0].get_text() == "by hand"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        found.to_frame()


def test_the_frame_has_a_row_for_each_form(found):
    frame = pytest.importorskip("pandas") and found.to_frame()
    assert list(frame.index) == [form.name for form in found.forms]
    assert frame.loc["by hand", "speed"] == 1


def test_what_cannot_be_timed_is_left_out_with_the_reason():
    def function(model, batch):
        losses = (model(batch["x"]) - batch["y"]) ** 2
        return losses.sum(), losses.numel()

    model = nn.Linear(5, 3)
    found = compare(
        model,
        ll.objective(model, function),
        ll.optim.SGD(lr=0.1),
        {"x": torch.randn(4, 5), "y": torch.randn(4, 3)},
        **QUICK,
    )
    assert [form.name for form in found.forms] == ["eager", "compiled", "donating"]
    assert set(found.left_out) == {"by hand", "folded"}
    assert "by hand: left out, an objective" in str(found)


def test_teeth_other_losses_are_not_timed(monkeypatch):
    def moved(goal, optimizer):
        params = {name: t + 1 for name, t in goal.init().items()}
        return ll.init(goal, optimizer, params=params)

    monkeypatch.setattr(benchmark, "init", moved)
    with pytest.raises(ValueError, match="the first losses differ"):
        compare(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, BATCH, **QUICK)


def test_losses_that_are_undefined_do_not_agree():
    too_fast = partial(torch.optim.SGD, lr=1e30)
    batch = torch.randn(8, 5), torch.randn(8, 3)
    with pytest.raises(ValueError, match=r"the first losses differ.*(inf|nan)"):
        compare(mlp(), nn.MSELoss(), too_fast, batch, **QUICK)


def test_nested_inputs_are_not_folded():
    class Two(nn.Linear):
        def forward(self, one, other):
            return super().forward(one + other)

    inputs, targets = BATCH
    batch = (inputs, inputs), targets
    found = compare(Two(5, 3), nn.CrossEntropyLoss(), torch.optim.SGD, batch, **QUICK)
    assert list(found.left_out) == ["folded"]


def test_where_nothing_is_compiled_there_is_nothing_to_compare():
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(
            RuntimeError, match="compare: there is nothing to compare: torch"
        ),
    ):
        compare(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, BATCH, **QUICK)


@pytest.mark.parametrize("rounds", [0, True, 1.5])
def test_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match="rounds"):
        compare(mlp(), nn.MSELoss(), torch.optim.SGD, BATCH, rounds=rounds)


# --- the works ------------------------------------------------------------------------


def test_the_works_are_the_same_each_time():
    once, again = works(), works()
    assert list(once) == ["MLP 128", "MLP 1024", "conv net", "transformer"]
    for name, work in once.items():
        assert len(work.inputs) == work.steps * work.batch_size
        assert work.inputs.equal(again[name].inputs)
        pairs = zip(
            work.model().parameters(), again[name].model().parameters(), strict=True
        )
        assert all(map(torch.equal, *zip(*pairs, strict=True)))


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(
        "lossloop._compile.inductor", lambda graph, inputs, **_: graph.forward
    )
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "--work", "MLP 128", "--epochs", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    _, head, row, reason = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["losses", "apart"]
    assert row.startswith("MLP 128")
    assert reason == "MLP 128: compile=True"
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--work", "large"])
    assert caught.value.code == 2
    assert "no work 'large'. There are MLP 128, MLP" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(sys, "executable", "false")
        with pytest.raises(RuntimeError, match="ended with status 1 before its next"):
            time_works(["MLP 128"], epochs=1)
    monkeypatch.setattr("lossloop._pace._Tutorial.epoch", lambda _: (0.1, 1.0))
    with pytest.raises(ValueError, match="in the tutorial's loop"):
        time_works(["MLP 128"], epochs=1)
