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

from lossloop.testing._compile_laws import (
    check_compiled_matches_eager,
    check_no_recompilation,
)
from lossloop.testing._laws import (
    check_order_invariance,
    check_partition_invariance,
    check_zero_weight_is_absence,
)
from lossloop.testing._report import Report, Row, verify
from lossloop.testing._search import LawBrokenError, Outcome
from lossloop.testing._step_laws import check_determinism, check_purity
from lossloop.testing._strategies import (
    batches,
    loss_data,
    models,
    partitions,
    sample_weights,
    torch_losses,
)
from lossloop.testing._torch_loop import check_matches_torch_loop
from lossloop.testing._update_laws import check_accumulation, check_gradients

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
