"""The laws that concern a step as a program: it changes nothing, and repeats itself."""

import json
import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from lossloop._objective import Objective
from lossloop._types import Batch, StepOutput
from lossloop.testing._factory import factory_name, load_factory, made_by
from lossloop.testing._search import (
    EXACT,
    Finding,
    Law,
    LawBrokenError,
    NotJudgedError,
    Outcome,
    Search,
    generators_kept,
    raised_on,
)
from lossloop.testing._subject import (
    STEP_SAMPLES,
    Program,
    State,
    Subject,
    admit,
    must_run,
    programs,
    step_samples,
)
from lossloop.testing._trees import Gap, bits, copied, digest, gap, named_leaves, number

PURITY = Law(
    "purity",
    "A step changes nothing outside: not its inputs, not what it returned before, not "
    "the random generators, not the module.",
    "Something is written in place (a momentum buffer, the statistics of BatchNorm, "
    "parameters), or a global random generator is seeded or drawn from.",
    "Compute new tensors (a + b instead of a.add_(b)) and return them; call modules "
    "with torch.func.functional_call on copies of their buffers; draw random numbers "
    "from a generator seeded from opt_state.",
)
DETERMINISM = Law(
    "determinism",
    "The same inputs give the same outputs bit for bit: again, after other inputs, in "
    "any state of the global generators, in another process.",
    "Something is kept between calls (a counter, a running average), or random numbers "
    "come from a global generator, the time, the process, or hash().",
    "Keep what changes in params or opt_state, and draw random numbers from a "
    "generator seeded from opt_state.",
)

# A step that seeds a global generator with 0 should not find it so.
_UNUSUAL = 3141592653

_FRESH = """\
import sys
from lossloop.testing._step_laws import write_fingerprint
write_fingerprint(*sys.argv[1:])
"""
_PATIENCE = 600  # seconds for it


# --- purity ---------------------------------------------------------------------------


def check_purity(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks that a step leaves everything but its results as it was.

    After each of some steps, the inputs must be bit for bit what they were, with the
    same `requires_grad` and no `.grad` written; so must be the global random generators
    of torch, numpy and Python, the grad mode, the default dtype, what earlier steps
    returned, and the module of an objective. The step has been called once before, so
    that what it keeps from its first call on, like a cache, does not count.

    Args:
        subject: As for `check_partition_invariance`. Of an objective, the steps of
            `make_step` and `make_eval_step` are checked.
        data: As for `check_partition_invariance`.
        params: To start from; default those of the objective's model.
        opt_state: To start from; default that of `init`.
        optimizer: As for `make_step`; default SGD with momentum.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        How many examples were tried; there is no difference.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, a missing state.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> from lossloop.testing import check_purity
        >>> def step(params, velocity, batch):
        ...     velocity.mul_(0.9).add_(params["w"] - batch.mean())  # in place
        ...     w = params["w"] - 0.1 * velocity
        ...     return {"w": w}, velocity, ((w - batch) ** 2).sum(), len(batch)
        >>> start = {"params": {"w": torch.ones(())}, "opt_state": torch.zeros(())}
        >>> check_purity(step, torch.rand(8), **start)
        Traceback (most recent call last):
        lossloop.testing._search.LawBrokenError: purity is broken...
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_purity", subject, data, state)
    return purity(admitted, Search(examples, seed))


@generators_kept()
def purity(subject: Subject, search: Search) -> Outcome:
    """Judges `PURITY`."""
    for program in programs(subject):
        must_run(PURITY, subject, program.call)

    def judge(batches: list[list[int]]) -> Finding:
        change = Gap(0.0, "")
        for program in programs(subject):
            change = max(change, _change(subject, program, batches))
        samples = [sample for batch in batches for sample in batch]
        return Finding(samples, change.size, lambda: change.words)

    batches = st.lists(step_samples(subject), min_size=1, max_size=3)
    return search.run(PURITY, EXACT, batches, judge, repeatable=False)


class _Inputs(NamedTuple):
    params: Any
    opt_state: Any
    batch: Batch


def _change(subject: Subject, program: Program, batches: list[list[int]]) -> Gap:
    """The first thing that some steps change outside, if there is one."""
    params, opt_state = copied((subject.params, subject.opt_state))
    results: list[tuple[StepOutput, StepOutput]] = []
    for samples in batches:
        inputs = _Inputs(params, opt_state, subject.take(samples))
        _seed_everything(_UNUSUAL)
        held, outside = _Held(inputs), _outside(subject)
        with raised_on(samples):
            output = program.call(*inputs)
        change = held.change() or _first_change(outside, _outside(subject))
        for result, before in results:
            if not change and bits(result) != bits(before):
                size, words = gap(result, before)
                change = Gap(size, f"what an earlier call returned changed: {words}")
        if change:
            where = f"{program.name}, call {len(results) + 1}, on samples {samples}"
            # A change of sign of zero is a change, and has no size.
            return Gap(change.size or math.inf, f"{where}: {change.words}.")
        results.append((output, copied(output)))
        params, opt_state = output.params, output.opt_state
    return Gap(0.0, "")


class _Held:
    """Inputs as they were before a call."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs, self._before = inputs, copied(inputs)
        self._leaves, self._flags = dict(named_leaves(inputs)), _flags(inputs)

    def change(self) -> Gap | None:
        """What is not as it was."""
        leaves = dict(named_leaves(self._inputs))
        for name in self._leaves | leaves:
            if name not in leaves or leaves[name] is not self._leaves.get(name):
                return Gap(math.inf, f"{name} was put in, taken out or replaced")
        flags = _first_change(self._flags, _flags(self._inputs))
        if flags or bits(self._inputs) == bits(self._before):
            return flags
        size, words = gap(self._inputs, self._before)
        return Gap(size, f"an input changed: {words}")


def _flags(inputs: _Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, leaf in named_leaves(inputs):
        if isinstance(leaf, torch.Tensor):
            found[f"requires_grad of {name}"] = leaf.requires_grad
            found[f"grad of {name}"] = bits(leaf.grad if leaf.is_leaf else None)
    return found


def _outside(subject: Subject) -> dict[str, Any]:
    """What a step could change besides its inputs."""
    found: dict[str, Any] = {
        "the random generator of torch": torch.get_rng_state().tolist(),
        "the random generator of numpy": pickle.dumps(np.random.get_state()),
        "the random generator of Python": random.getstate(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
    }
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        found["the random generator of CUDA"] = [state.tolist() for state in states]
    if isinstance(subject.objective, Objective):
        model = subject.objective.model
        found["the state of the module"] = bits(model.state_dict())
        found["the gradients of the module"] = [
            bits(p.grad) for p in model.parameters()
        ]
        found["the mode of the module"] = [m.training for m in model.modules()]
    return found


def _first_change(before: dict[str, Any], after: dict[str, Any]) -> Gap | None:
    for name, value in before.items():
        if after[name] != value:
            return Gap(math.inf, f"{name} changed")
    return None


# --- determinism ----------------------------------------------------------------------


def check_determinism(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    factory: str | Callable[[], Any] | None = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks that the same inputs give the same outputs, bit for bit.

    A step is called on the same inputs again, after other inputs, and with the global
    generators of torch, numpy and Python in other states. With `factory`, some steps
    are also made in a fresh process, with another PYTHONHASHSEED, and compared.

    Args:
        subject: As for `check_partition_invariance`. Of an objective, the steps of
            `make_step` and `make_eval_step` are checked.
        data: As for `check_partition_invariance`.
        params: To start from; default those of the objective's model.
        opt_state: To start from; default that of `init`.
        optimizer: As for `make_step`; default SGD with momentum.
        factory: "module:function", or such a function: it takes no arguments and
            returns `(subject, data)`, or a dictionary of the arguments of `verify`.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        How many examples were tried; there is no difference.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, a missing state, a
            factory that cannot be found or does not make the same twice.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> from lossloop.testing import check_determinism
        >>> def noisy(params, batch):
        ...     losses = (batch - params["w"]) ** 2 * np.random.rand()
        ...     return losses.sum(), len(batch)
        >>> check_determinism(noisy, torch.rand(8), params={"w": torch.ones(())})
        Traceback (most recent call last):
        lossloop.testing._search.LawBrokenError: determinism is broken...
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_determinism", subject, data, state)
    return determinism(admitted, Search(examples, seed), factory)


@generators_kept()
def determinism(
    subject: Subject,
    search: Search,
    factory: str | Callable[[], Any] | None = None,
) -> Outcome:
    """Judges `DETERMINISM`."""
    name = None if factory is None else factory_name(factory)
    for program in programs(subject):
        must_run(DETERMINISM, subject, program.call)
    first: dict[tuple[str, tuple[int, ...]], StepOutput] = {}

    def judge(example: tuple[list[int], list[int], int]) -> Finding:
        samples, others, generator_seed = example
        apart = Gap(0.0, "")
        for program in programs(subject):
            _seed_everything(0)
            output = subject.call(program.call, samples)
            key = program.name, tuple(samples)
            first.setdefault(key, copied(output))
            again = {"at another time": first[key]}
            _seed_everything(generator_seed)
            again["in another state of the generators"] = subject.call(
                program.call, samples
            )
            moved = subject._replace(params=output.params, opt_state=output.opt_state)
            moved.call(program.call, others)
            again[f"after samples {others}"] = subject.call(program.call, samples)
            for when, other in again.items():
                if bits(other) != bits(output):
                    size, words = gap(other, output)
                    text = f"{program.name} on samples {samples}, and {when}: {words}."
                    apart = max(apart, Gap(size or math.inf, text))
        return Finding(samples, apart.size, lambda: apart.words)

    examples = st.tuples(
        step_samples(subject), step_samples(subject), st.integers(1, 2**32 - 1)
    )
    outcome = search.run(DETERMINISM, EXACT, examples, judge, repeatable=False)
    if name is not None:
        _check_fresh_process(name)
    return outcome


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _check_fresh_process(factory: str) -> None:
    here, there = _fingerprint(factory), _fingerprint_elsewhere(factory)
    if here["inputs"] != there["inputs"]:
        raise NotJudgedError(
            DETERMINISM,
            f"in a fresh process {factory} makes other params or other data. Let it "
            f"make the same every time: seed what it draws from.",
        )
    if here["outputs"] != there["outputs"]:
        losses = f"the losses {', '.join(here['losses'])} here, and "
        losses += f"{', '.join(there['losses'])} in a fresh process"
        if here["losses"] == there["losses"]:
            losses = "other params or another opt_state in a fresh process"
        raise LawBrokenError(
            DETERMINISM,
            EXACT,
            math.inf,
            here["samples"],
            f"steps on samples {here['samples']} give {losses}.",
            None,
        )


def _fingerprint_elsewhere(factory: str) -> dict[str, Any]:
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fingerprint.json")
        command = [sys.executable, "-c", _FRESH, factory, str(file)]
        try:
            done = subprocess.run(
                [*command, str(torch.get_num_threads())],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            why = f"{factory} took more than {_PATIENCE} s in a fresh process."
            raise NotJudgedError(DETERMINISM, why) from None
        if done.returncode or not file.exists():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            why = f"{factory} fails in a fresh process: {last}"
            raise NotJudgedError(DETERMINISM, why)
        return json.loads(file.read_text())


def write_fingerprint(factory: str, file: str, threads: str) -> None:
    """Writes the fingerprint of a factory; for a process of its own.

    Args:
        factory: "module:function".
        file: To write.
        threads: How many torch may use: sums are cut by their number.
    """
    torch.set_num_threads(int(threads))
    Path(file).write_text(json.dumps(_fingerprint(factory)))


@generators_kept()
def _fingerprint(factory: str) -> dict[str, Any]:
    """What some steps of what a factory makes are, bit for bit."""
    load_factory(factory)  # importing may draw numbers, once in each process
    _seed_everything(0)
    made = made_by(factory)
    state = State(*(made.get(name) for name in State._fields))
    subject = admit("check_determinism", made["subject"], made["data"], state)
    inputs = _Inputs(subject.params, subject.opt_state, subject.batch)
    samples = list(range(min(STEP_SAMPLES, subject.size)))
    outputs: list[StepOutput] = []
    for program in programs(subject):
        current = subject
        for _ in range(3):
            output = current.call(program.call, samples)
            outputs.append(output)
            current = subject._replace(params=output.params, opt_state=output.opt_state)
    return {
        "inputs": digest(inputs),
        "outputs": digest(outputs),
        "samples": samples,
        "losses": [number(output.loss_sum) for output in outputs],
    }
