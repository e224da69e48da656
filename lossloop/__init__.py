"""Training as a fold of one compiled pure function, with exact epoch losses."""

from importlib.metadata import version

from lossloop import loggers, metrics, optim, probes, schedules
from lossloop._baseline import constant_predictor, data_facts
from lossloop._batches import pad_last
from lossloop._checkpoint import CheckpointCorrupt, CheckpointMismatch, load, save
from lossloop._compile import compile_step
from lossloop._diagnosis import Diagnosis, Facts, Finding, diagnose
from lossloop._files import CheckpointWriteError
from lossloop._fit import Result, fit
from lossloop._fold import EndPass, fold, fold_eval, fold_metrics
from lossloop._gate import NonFiniteError
from lossloop._history import History
from lossloop._losses import batch_mean, loss_pair
from lossloop._mean import Mean
from lossloop._model import load_params
from lossloop._objective import Objective, objective, supervised
from lossloop._optimizers import follow, from_torch, load_opt_state
from lossloop._precision import loss_scale
from lossloop._run import Run
from lossloop._scan import compile_fold
from lossloop._step import init, make_eval_step, make_step
from lossloop._stopping import EarlyStopping
from lossloop._training import EpochRecord, StepRecord
from lossloop._types import Optimizer, OptState

__version__ = version("lossloop")

__all__ = [
    "CheckpointCorrupt",
    "CheckpointMismatch",
    "CheckpointWriteError",
    "Diagnosis",
    "EarlyStopping",
    "EndPass",
    "EpochRecord",
    "Facts",
    "Finding",
    "History",
    "Mean",
    "NonFiniteError",
    "Objective",
    "OptState",
    "Optimizer",
    "Result",
    "Run",
    "StepRecord",
    "batch_mean",
    "compile_fold",
    "compile_step",
    "constant_predictor",
    "data_facts",
    "diagnose",
    "fit",
    "fold",
    "fold_eval",
    "fold_metrics",
    "follow",
    "from_torch",
    "init",
    "load",
    "load_opt_state",
    "load_params",
    "loggers",
    "loss_pair",
    "loss_scale",
    "make_eval_step",
    "make_step",
    "metrics",
    "objective",
    "optim",
    "pad_last",
    "probes",
    "save",
    "schedules",
    "supervised",
]
