"""Laws of exact and pure training, to check your own objectives and steps by.

For pytest and Hypothesis, and for scripts: `verify` checks all laws at once. A check
returns an `Outcome` if its law holds, and raises `LawBrokenError`, an `AssertionError`,
with the smallest counterexample found, if not.
"""

import importlib

try:
    importlib.import_module("hypothesis")
except ImportError as error:
    raise ImportError(
        "lossloop.testing needs hypothesis: python -m pip install 'lossloop[testing]'"
    ) from error

from lossloop._compile_laws import check_compiled_matches_eager, check_no_recompilation
from lossloop._examples import LawBrokenError, Outcome
from lossloop._laws import (
    check_order_invariance,
    check_partition_invariance,
    check_zero_weight_is_absence,
)
from lossloop._report import Report, Row, verify
from lossloop._step_laws import check_determinism, check_purity
from lossloop._strategies import (
    batches,
    loss_data,
    models,
    partitions,
    sample_weights,
    torch_losses,
)
from lossloop._torch_loop import check_matches_torch_loop
from lossloop._update_laws import check_accumulation, check_gradients

__all__ = [
    "LawBrokenError",
    "Outcome",
    "Report",
    "Row",
    "batches",
    "check_accumulation",
    "check_compiled_matches_eager",
    "check_determinism",
    "check_gradients",
    "check_matches_torch_loop",
    "check_no_recompilation",
    "check_order_invariance",
    "check_partition_invariance",
    "check_purity",
    "check_zero_weight_is_absence",
    "loss_data",
    "models",
    "partitions",
    "sample_weights",
    "torch_losses",
    "verify",
]
