"""The history: rows and columns, files, continued runs, tables, and the picture."""

import builtins
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossloop._diagnosis import diagnose
from lossloop._history import History

COLUMNS = ("epoch", "step", "train_loss", "val_loss", "lr", "seconds", "n_train")


def rows(count=6, **columns):
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 2.0 / epoch,
            "val_loss": 1.0 + abs(epoch - 4) / 8,
            **{name: column[epoch - 1] for name, column in columns.items()},
        }
        for epoch in range(1, count + 1)
    ]


numbers = st.one_of(st.none(), st.floats(), st.integers(-(10**20), 10**20))
cells = st.one_of(numbers, st.booleans())
histories = st.integers(1, 4).flatmap(
    lambda count: st.lists(
        st.fixed_dictionaries(
            {"train_loss": numbers, "val_loss": numbers},
            optional={"val_accuracy": cells, "skipped": st.integers(0, 9)},
        ),
        min_size=count,
        max_size=count,
    ).map(
        lambda found: History(
            [{"epoch": i, "step": 3 * i, **row} for i, row in enumerate(found, 1)]
        )
    )
)


def same(one, other):
    """Cell by cell, with types, and NaN equal to itself."""
    if one.columns != other.columns or len(one) != len(other):
        return False
    return all(
        (type(a[name]), repr(a[name])) == (type(b[name]), repr(b[name]))
        for a, b in zip(one, other, strict=True)
        for name in one.columns
    )


# --- files ----------------------------------------------------------------------------


@given(histories)
def test_what_is_written_reads_back_bit_for_bit(history):
    assert same(History.from_csv(history.to_csv()), history)
    assert same(History.from_json(history.to_json()), history)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_files(form, tmp_path):
    history = History(rows())
    path = tmp_path / f"history.{form}"
    assert getattr(history, f"to_{form}")(path) is None
    read = getattr(History, f"from_{form}")
    assert same(read(path), history)
    assert same(read(str(path)), history)
    with pytest.raises(OSError, match="missing"):
        read(tmp_path / "missing")


def test_an_object_per_line_is_read_too():
    text = "\n".join(map(json.dumps, rows()))
    assert same(History.from_json(text), History(rows()))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (History.from_csv, "epoch,step\n1\n", "line 2 has 1 cells, and the header 2"),
        (History.from_json, "[1, 2]", "a list of objects"),
        (History.from_json, '{"epoch": 1', "no JSON .* cut off"),
    ],
)
def test_what_is_no_history_is_refused(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_what_cannot_be_read_back_is_not_written():
    history = History([{"epoch": 1, "odd": object()}])
    for method in (history.to_csv, history.to_json):
        with pytest.raises(TypeError, match=r"history\[0\]\['odd'\]"):
            method()


def test_pandas():
    frame = History(rows(val_accuracy=[None, *[0.5] * 5])).to_pandas()
    assert list(frame["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert frame["val_accuracy"].isna().tolist() == [True, *[False] * 5]


@pytest.mark.parametrize(
    ("package", "call"),
    [("pandas", History.to_pandas), ("matplotlib", History.plot)],
)
def test_a_missing_package_is_named(package, call, monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package or name.endswith("_plot"):
            raise ImportError(f"no {package}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        call(History(rows()))


# --- rows -----------------------------------------------------------------------------


def test_columns_are_united_and_keep_their_order():
    history = History([{"epoch": 1, "b": 1}]).append({"epoch": 2, "a": 2})
    assert history.columns == ("epoch", "b", "a")
    assert list(history) == [
        {"epoch": 1, "b": 1, "a": None},
        {"epoch": 2, "b": None, "a": 2},
    ]


def test_a_history_does_not_change():
    row = {"epoch": 1, "train_loss": 0.5}
    history = History([row])
    row["train_loss"] = history[0]["train_loss"] = 9.0
    next(iter(history))["train_loss"] = 9.0
    history.append({"epoch": 2, "train_loss": 0.1, "new": 1})
    assert list(history) == [{"epoch": 1, "train_loss": 0.5}]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([math.nan, 2.0, 2.0], 2),
        ([-math.inf, None, 5.0], 3),
        ([None, None, math.nan], None),
    ],
)
def test_the_best_epoch(losses, best):
    found = [{"epoch": i, "val_loss": loss} for i, loss in enumerate(losses, 1)]
    assert History(found).best_epoch == best
    assert History([{"epoch": 1}]).best_epoch is None


# --- continued runs -------------------------------------------------------------------


def test_a_continued_run_goes_on_counting():
    merged = History(rows(2)).merge(History(rows(3, extra=[7, 8, 9])))
    assert merged["epoch"] == [1, 2, 3, 4, 5]
    assert merged["step"] == [10, 20, 30, 40, 50]
    assert merged["extra"] == [None, None, 7, 8, 9]


def test_steps_that_go_on_already_stay():
    later = [{**row, "step": row["step"] + 20} for row in rows(2)]
    merged = History(rows(2)).merge(History(later))
    assert (merged["epoch"], merged["step"]) == ([1, 2, 3, 4], [10, 20, 30, 40])


@given(histories, histories, histories)
def test_merging_is_associative(a, b, c):
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(History()), a)
    assert same(History().merge(a), a)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(TypeError, match="must be a History"):
        History(rows()).merge(rows())
    with pytest.raises(ValueError, match=r"later\[0\]\['epoch'\] must be an int"):
        History(rows()).merge(History([{"train_loss": 1.0}]))


# --- tables ---------------------------------------------------------------------------


def test_the_table_marks_the_best_epoch():
    lines = repr(History(rows())).splitlines()
    assert [line.split()[0] for line in lines] == ["epoch", *"123", "*4", *"56"]
    assert repr(History()) == "History()"


def test_long_tables_are_cut():
    losses = [2.0] * 100
    losses[49] = 1.0
    history = History([{"epoch": i, "val_loss": v} for i, v in enumerate(losses, 1)])
    lines = repr(history).splitlines()
    assert len(lines) == 1 + 5 + 1 + 20
    assert "75 epochs left out, the best, 50, among them" in lines[6]
    assert "75 epochs left out" in history._repr_html_()


def test_the_html_table_is_escaped_and_marks_the_best():
    shown = History([{**row, "<b>": "<i>"} for row in rows()])._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert "<i>" not in shown
    (best,) = re.findall(r"<tr style=.*?</tr>", shown)
    assert ">*4<" in best


# --- the picture ----------------------------------------------------------------------


def lines_of(figure, panel=0):
    axes = figure.axes[panel]
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_picture_has_a_panel_for_what_there_is(tmp_path):
    plain = History(rows()).plot()
    assert [axes.get_ylabel() for axes in plain.axes] == ["loss"]
    full = History(
        rows(
            lr=[0.1, 0.2, 0.3, 0.2, 0.1, 1e-8],
            val_accuracy=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
            val_se=[0.1] * 6,
        )
    ).plot(tmp_path / "all.png", title="All")
    assert {axes.get_yscale() for axes in full.axes} == {"linear"}
    labels = [axes.get_ylabel() for axes in full.axes]
    assert labels == ["loss", "accuracy", "learning rate"]
    assert full.get_suptitle() == "All"
    styles = {label: line.get_linestyle() for label, line in lines_of(full).items()}
    assert styles["training"] == "-"
    assert "--" in styles.values(), "training and validation differ without colour"


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_pictures_are_saved(suffix, tmp_path):
    path = tmp_path / f"curves.{suffix}"
    History(rows()).plot(path)
    assert path.stat().st_size > 3000


@pytest.mark.parametrize(
    "found",
    [
        rows(1),
        [{"epoch": 1, "train_loss": math.nan, "val_loss": math.inf}],
        [{"epoch": i, "train_loss": math.nan} for i in range(1, 4)],
        [{"epoch": i, "train_loss": 1e300 * i} for i in range(1, 4)],
        [{"epoch": i, "train_loss": 1.0 / i, "val_loss": None} for i in range(1, 4)],
        [{"epoch": i, "train_loss": -1.0 * i} for i in range(1, 4)],
        [{"epoch": i, "train_loss": 1.0 / i} for i in range(1, 10_001)],
    ],
)
def test_every_history_is_drawn(found, tmp_path):
    History(found).plot(tmp_path / "curves.png")


def test_the_axis_is_logarithmic_for_what_spans_decades():
    def scale(losses):
        found = [{"epoch": i, "train_loss": v} for i, v in enumerate(losses, 1)]
        return History(found).plot().axes[0].get_yscale()

    assert scale([1.0, 0.5, 0.1]) == "linear"
    assert scale([1.0, 0.1, 0.001]) == "log"
    assert scale([1.0, 0.1, 0.0]) == "linear"


def test_a_diagnosis_is_written_and_shaded():
    history = History(
        [
            {"epoch": i, "train_loss": 2.0 / i, "val_loss": 1.0 + abs(i - 8) / 20}
            for i in range(1, 31)
        ]
    )
    diagnosis = diagnose(history)
    assert diagnosis.primary == "overfit"
    top = history.plot(diagnosis=diagnosis).axes[0]
    assert "overfit" in top.get_title(loc="left")
    (shade,) = (patch for patch in top.patches if patch.get_alpha() is None)
    assert shade.get_x() == 8
    assert not history[:8].plot(diagnosis=diagnose(history[:8])).axes[0].patches


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        History([{"epoch": 1}]).plot()
