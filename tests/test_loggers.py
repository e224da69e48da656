"""The loggers: what they write reads back, at once, and continues a run."""

import csv
import gc
import json
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import lossloop as ll
from lossloop import loggers

ROWS = [
    {"epoch": 1, "step": 8, "train_loss": 0.1, "val_loss": None, "lr": 1e-3},
    {"epoch": 2, "step": 16, "train_loss": 1 / 3, "val_loss": math.inf, "lr": 1e-3},
    {"epoch": 3, "step": 24, "train_loss": 2.5e-17, "val_loss": 1e300, "lr": 5e-324},
]


class Untouchable:
    """Stands for tensors: whoever looks at it is caught."""

    def __getattr__(self, name):
        raise AssertionError(f"a logger has asked for {name}")


def record(row):
    return ll.EpochRecord(row, Untouchable(), Untouchable())


def read_csv(path):
    with path.open(newline="") as lines:
        return [*csv.DictReader(lines)]


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


FILES = {"csv": read_csv, "json_lines": read_json_lines}


# --- files ----------------------------------------------------------------------------


def test_csv_has_a_header_and_a_line_per_epoch(tmp_path):
    path = tmp_path / "run.csv"
    log = loggers.csv(path)
    for number, row in enumerate(ROWS, 1):
        log(record(row))
        assert len(path.read_text().splitlines()) == 1 + number  # it is there at once
    assert path.read_text().splitlines()[:2] == [
        "epoch,step,train_loss,val_loss,lr",
        "1,8,0.1,,0.001",
    ]
    for line, row in zip(read_csv(path), ROWS, strict=True):
        for name, value in row.items():
            assert line[name] == "" if value is None else float(line[name]) == value


def test_json_lines_read_back_exactly(tmp_path):
    path = tmp_path / "run.jsonl"
    log = loggers.json_lines(path)
    for number, row in enumerate(ROWS, 1):
        log(record(row))
        assert read_json_lines(path) == ROWS[:number]
    log(record({"epoch": 4, "train_loss": math.nan}))
    assert math.isnan(read_json_lines(path)[-1]["train_loss"])


@pytest.mark.parametrize("name", FILES)
def test_a_continued_run_goes_on_in_the_same_file(name, tmp_path):
    path, logger = tmp_path / "run", getattr(loggers, name)
    for rows in (ROWS[:1], ROWS[1:]):
        log = logger(path, append=True)  # the first time, there is no file
        for row in rows:
            log(record(row))
    whole = tmp_path / "whole"
    log = logger(whole)
    for row in ROWS:
        log(record(row))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_something_in_it_is_not_overwritten(name, tmp_path):
    path, logger = tmp_path / "run", getattr(loggers, name)
    logger(path)(record(ROWS[0]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"exists\. Pass append=True"):
        logger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_logger_refuses_at_the_door(name, tmp_path):
    logger = getattr(loggers, name)
    with pytest.raises(ValueError, match="there is no folder"):
        logger(tmp_path / "nowhere" / "run")
    path = tmp_path / "run"
    logger(path)(record(ROWS[0]))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="in the middle of a line"):
        logger(path, append=True)
    with pytest.raises(OSError, match="directory"):
        logger(tmp_path, append=True)


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file_and_a_path_as_text_will_do(name, tmp_path):
    path = tmp_path / "run"
    path.touch()
    getattr(loggers, name)(str(path))(record(ROWS[0]))
    assert len(FILES[name](path)) == 1


def test_new_columns_rewrite_the_csv_and_missing_ones_are_empty(tmp_path):
    path = tmp_path / "run.csv"
    log = loggers.csv(path)
    log(record({"epoch": 1, "note": 'a "quoted", long\nnote'}))
    log(record({"epoch": 2}))
    log(record({"epoch": 3, "accuracy": 0.5}))
    loggers.csv(path, append=True)(record({"f1": 1, "epoch": 4}))
    assert read_csv(path) == [
        {"epoch": "1", "note": 'a "quoted", long\nnote', "accuracy": "", "f1": ""},
        {"epoch": "2", "note": "", "accuracy": "", "f1": ""},
        {"epoch": "3", "note": "", "accuracy": "0.5", "f1": ""},
        {"epoch": "4", "note": "", "accuracy": "", "f1": "1"},
    ]
    assert [path] == [*tmp_path.iterdir()]


def test_what_json_cannot_say_leaves_the_file_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    log = loggers.json_lines(path)
    log(record(ROWS[0]))
    with pytest.raises(TypeError):
        log(record({"epoch": 2, "train_loss": torch.ones(())}))
    assert read_json_lines(path) == ROWS[:1]


# --- contexts -------------------------------------------------------------------------


def test_a_logger_is_a_context_and_says_so_when_it_is_closed(tmp_path):
    with loggers.csv(tmp_path / "run.csv") as log:
        log(record(ROWS[0]))
    log.close()  # once more does nothing
    with pytest.raises(ValueError, match="is closed"):
        log(record(ROWS[1]))


def test_close_is_called_once_at_the_end_or_when_the_logger_is_gone():
    closed = []
    log = loggers.Logger(lambda row: None, lambda: closed.append(1))
    del log
    gc.collect()
    assert closed == [1]
    with loggers.Logger(lambda row: None, lambda: closed.append(2)) as log:
        pass
    del log
    gc.collect()
    assert closed == [1, 2]


# --- TensorBoard ----------------------------------------------------------------------


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_has_one_scalar_per_numeric_column(tmp_path):
    log = loggers.tensorboard(tmp_path / "run")
    rows = [{**row, "train_loss": 0.5 * row["epoch"], "note": "a"} for row in ROWS[:2]]
    for number, row in enumerate(rows, 1):
        log(record(row))
        assert len(scalars(tmp_path / "run")["train_loss"]) == number  # at once
    log.close()
    found = scalars(tmp_path / "run")
    assert set(found) == {"epoch", "train_loss", "val_loss", "lr"}
    assert found["train_loss"] == [(8, 0.5), (16, 1.0)]
    assert found["val_loss"] == [(16, math.inf)]


def test_tensorboard_continues_a_run_only_if_told(tmp_path):
    for append, row in ((False, ROWS[0]), (True, ROWS[1])):
        with loggers.tensorboard(tmp_path, append=append) as log:
            log(record(row))
    assert [step for step, _ in scalars(tmp_path)["lr"]] == [8, 16]
    with pytest.raises(ValueError, match="holds a run already"):
        loggers.tensorboard(tmp_path)


def test_without_tensorboard_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        loggers.tensorboard(tmp_path)


# --- the picture ----------------------------------------------------------------------


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook shows, with a fake IPython: the pictures of each display."""
    shown = []

    class Image:
        def __init__(self, *, data, format):
            assert format == "png"
            self.data = data

    class Handle:
        def __init__(self, pictures):
            self.update = pictures.append

    def display(picture, *, display_id):
        assert display_id is True
        shown.append([picture])
        return Handle(shown[-1])

    module = ModuleType("IPython.display")
    module.display, module.Image = display, Image
    package = ModuleType("IPython")
    package.version_info = (9, 0)  # matplotlib asks for it
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loggers, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def drawn(monkeypatch):
    """Pictures that say which epochs they show."""

    class Figure:
        def __init__(self, history):
            self.epochs = bytes(history["epoch"])

        def savefig(self, file, **_):
            file.write(self.epochs)

    monkeypatch.setattr(ll.History, "plot", lambda history: Figure(history))


def test_one_display_is_drawn_anew_but_not_too_often(notebook, clock, drawn):
    log = loggers.live_plot(every=10)
    for epoch in range(1, 8):
        log(record({"epoch": epoch}))
        clock[0] += 4
    (pictures,) = notebook
    assert [len(picture.data) for picture in pictures] == [1, 4, 7]


def test_the_last_epochs_are_drawn_at_the_end(notebook, clock, drawn):
    with loggers.live_plot(every=1000) as log:
        for epoch in (1, 2, 3):
            log(record({"epoch": epoch}))
    assert [[*picture.data] for picture in notebook[0]] == [[1], [1, 2, 3]]
    log.close()
    assert len(notebook[0]) == 2


def test_a_run_that_is_over_has_drawn_its_last_epochs(notebook, clock, drawn):
    data = torch.ones(4, 1), torch.ones(4, 1)
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"epochs": 3, "progress": False, "compile": False}
    ll.fit(model, nn.MSELoss(), sgd, data, on_epoch=loggers.live_plot(), **options)
    gc.collect()
    assert [[*picture.data] for picture in notebook[0]] == [[1], [1, 2, 3]]


def test_without_epochs_nothing_is_drawn(notebook, drawn):
    with loggers.live_plot():
        pass
    assert notebook == []


def test_the_picture_is_that_of_the_history(notebook):
    with loggers.live_plot(every=0) as log:
        log(record({**ROWS[0], "val_loss": 0.5}))
    assert notebook[0][0].data.startswith(b"\x89PNG")


def test_what_live_plot_refuses(notebook):
    for every in (-1, math.nan):
        with pytest.raises(ValueError, match="must be at least 0"):
            loggers.live_plot(every=every)


@pytest.mark.parametrize("missing", ["IPython.display", "matplotlib"])
def test_without_ipython_the_remedy_is_named(notebook, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="pip install ipython matplotlib"):
        loggers.live_plot()


# --- several, and a whole run ---------------------------------------------------------


def test_several_calls_each_in_order_and_stops_if_one_says_so():
    seen = []

    def say(name, answer):
        def callback(_):
            seen.append(name)
            return answer

        return callback

    go_on = loggers.several(say("a", None), say("b", "something"))
    stop = loggers.several(say("c", "stop"), say("d", None))
    assert go_on(record({})) is None
    assert stop(record({})) == "stop"
    assert seen == ["a", "b", "c", "d"]
    assert loggers.several()(record({})) is None
    with pytest.raises(TypeError, match="takes functions of an EpochRecord, got 3"):
        loggers.several(seen.append, 3)


def test_a_run_is_logged_to_all_places_and_can_be_stopped(tmp_path):
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(8, 1), torch.randn(8, 1)

    def two_epochs(record):
        return "stop" if record.row["epoch"] == 2 else None

    log = loggers.several(
        loggers.csv(tmp_path / "run.csv"),
        loggers.json_lines(tmp_path / "run.jsonl"),
        two_epochs,
    )
    options = {"epochs": 5, "progress": False, "compile": False}
    history = ll.fit(
        model, nn.MSELoss(), sgd, data, data, on_epoch=log, **options
    ).history
    assert len(history) == 2
    assert read_json_lines(tmp_path / "run.jsonl") == [*history]
    for line, row in zip(read_csv(tmp_path / "run.csv"), history, strict=True):
        assert line == {k: "" if v is None else repr(v) for k, v in row.items()}
