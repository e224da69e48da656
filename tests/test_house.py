"""The house rules: floors, public names, who reads the device, what is documented."""

import ast
import inspect
from pathlib import Path

import pytest

import lossloop as ll
import lossloop.benchmark
import lossloop.loggers
import lossloop.probes
import lossloop.testing

HOME = Path(ll.__file__).parent
# A module may import from floors below its own only.
FLOORS = [
    {"_types", "schedules", "_plot", "_diagnosis", "_files", "_interruption"}
    | {"_malloc"},
    {"_mean", "_random", "_model", "_history", "_loss_checks", "_ctc", "_formulas"}
    | {"_memory", "_works", "_machine", "_ema", "_gate"},
    {"_run"},
    {"_losses", "_optimizers", "_batches", "_progress", "_precision", "_stopping"},
    {"_objective", "optim", "_schedule", "metrics"},
    {"_step", "_fold", "_coupling", "_baseline", "_checkpoint", "_order", "_watch"},
    {"_isa", "_replay", "_inlined"},
    {"_products", "_bounds", "_pooling", "_logits", "_sums", "_in_turn"},
    {"_compile", "_plan"},
    {"_scan", "_journal"},
    {"_training"},
    {"_fit"},
    {"_demo", "_pace", "probes", "loggers"},
    {"benchmark"},
    {"__init__"},
    # Only the command line knows the verifier, which needs Hypothesis.
    {"testing._trees", "testing._factory", "testing._strategies", "testing._search"},
    {"testing._subject"},
    {"testing._frozen"},
    {"testing._laws", "testing._update_laws", "testing._torch_loop"}
    | {"testing._step_laws", "testing._compile_laws"},
    {"testing._report"},
    {"testing.__init__"},
    {"__main__"},
]
FILES = {
    ".".join(path.relative_to(HOME).with_suffix("").parts): path
    for path in HOME.rglob("*.py")
}


def tree(module):
    return ast.parse(FILES[module].read_text())


def imported(module):
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module == "lossloop":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("lossloop."):
            names.add(node.module.removeprefix("lossloop."))
    packages = {name.removesuffix(".__init__") for name in FILES}
    return {name if name in FILES else f"{name}.__init__" for name in names & packages}


def test_every_module_has_a_floor():
    assert sorted(name for floor in FLOORS for name in floor) == sorted(FILES)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_point_down(floor):
    below = set().union(*FLOORS[:floor])
    for module in FLOORS[floor]:
        assert imported(module) <= below, f"{module} may import from {below}"


def test_teeth_an_upward_import_is_seen():
    assert "_step" in imported("_fit")
    assert "_fit" not in set().union(*FLOORS[:6])


def test_public_names_are_sorted_and_there():
    assert ll.__all__ == sorted(ll.__all__)
    assert all(hasattr(ll, name) for name in ll.__all__)
    assert ll.__version__


def _documented():
    for module in (
        *(
            ll,
            ll.benchmark,
            ll.loggers,
            ll.metrics,
            ll.optim,
            ll.probes,
            ll.schedules,
            ll.testing,
        ),
    ):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", list(_documented()))
def test_public_names_are_documented(thing):
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].endswith((".", "`", ")"))
    if inspect.isfunction(thing):
        assert ">>>" in doc, "every function shows an example that runs"
        parameters = inspect.signature(thing).parameters
        section = doc.partition("Args:")[2].partition("Returns:")[0]
        for name in parameters:
            assert f"{name}:" in section, f"{name} is not documented"


READS = {"item", "tolist", "numpy", "cpu"}


def test_who_reads_values_on_the_host():
    """In training, the mean alone; the others look at a first batch or at the end."""
    readers = {}
    for module in FILES:
        for node in ast.walk(tree(module)):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if called and node.func.attr in READS:
                readers.setdefault(module, set()).add(node.func.attr)
    assert set(readers) <= {
        "_mean",  # once per epoch
        "metrics",  # likewise
        "_baseline",  # after a run
        "_checkpoint",  # on the host anyway
        "_memory",  # the seed of a sampler, as torch does
        "_order",  # generators, which are there; a batch, once per epoch of a saved run
        "probes",  # between steps
        "_loss_checks",  # the first batch
        "_objective",  # the first batch
        "_coupling",  # likewise
        "_optimizers",  # handing the state back to torch
        "_schedule",  # the rate, once per run
        "_demo",
        "_works",  # as tutorials do
        "testing._trees",  # the verifier: compares on the host
        "testing._subject",
        "testing._update_laws",
        "testing._step_laws",
    }
