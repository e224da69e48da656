"""What `diagnose` says: of made-up runs, of noise, and laws."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from lossloop import History
from lossloop._diagnosis import (
    RISE,
    RULES,
    Curve,
    Diagnosis,
    Facts,
    Finding,
    _kendall_p,
    _read,
    _sigma,
    _trend,
    diagnose,
    recheck,
)

# --- made-up runs, one for each verdict -----------------------------------------------

T = np.arange(1, 41)
FALLING = 2 * 0.7**T + 0.1
RISING = FALLING + 0.3 + 0.02 * np.maximum(T - 12, 0)
FLAT = np.where(T % 2, 1.0, 0.995)


def run(train, val=None, **options):
    columns = {"train_loss": [*map(float, train)]}
    if val is not None:
        columns["val_loss"] = [*map(float, val)]
    return columns, options


RUNS = {
    "a NaN": ("nonfinite", run([1.0, math.nan, 0.5], [1.0, 0.9, 0.8])),
    "before training": ("nonfinite", run([1.0], initial_val_loss=math.inf)),
    "noted": ("nonfinite", run([1.0], facts=Facts(first_nonfinite={"epoch": 1}))),
    "above its start": ("diverging", run(1.1**T)),
    "up again": ("diverging", run(FALLING + 0.5 * 1.2 ** (T - 40), baseline=2.0)),
    "constant inputs": (
        "dead_input",
        run(FLAT, facts=Facts(n_constant=4, n_features=4)),
    ),
    "same outputs": (
        "dead_input",
        run(FLAT, facts=Facts(output_std=1e-9, output_mean=0.1)),
    ),
    "flat": ("no_progress", run(FLAT, FLAT, baseline=1.0)),
    "copies": (
        "leak_duplicates",
        run(FALLING, FALLING, facts=Facts(n_duplicates=1, n_val=100)),
    ),
    "learned by heart": ("no_signal", run(FALLING, 1.5 + T / 40, baseline=1.5)),
    "within the error": (
        "no_signal",
        run(FALLING, 1.45 + T / 40, baseline=1.53, val_se=0.1),
    ),
    "rising": ("overfit", run(FALLING, RISING, baseline=2.0)),
    "without a baseline": ("overfit", run(FALLING, RISING)),
    "frozen gap": (
        "overfit",
        run(FALLING, FALLING + 0.6, baseline=2.0, frozen_train_loss=0.05, val_se=0.01),
    ),
    "jumps": ("unstable", run(np.where(T % 2, 1.5, 0.8), FALLING, baseline=2.5)),
    "still falling": ("undertrained", run(2 - T / 40, 2 - T / 50, baseline=2.0)),
    "no validation": ("undertrained", run(2 - T / 40)),
    "better reference": (
        "too_simple",
        run(FALLING, FALLING, facts=Facts(reference_val_loss=0.05, reference_z=4.0)),
    ),
    "well": ("healthy", run(FALLING, FALLING + 0.05, baseline=2.0)),
    "no baseline": ("healthy", run(FALLING, FALLING + 0.05)),
    "few epochs": ("inconclusive", run(FALLING[:7], FALLING[:7])),
    "none": ("inconclusive", run([])),
    "nothing to compare": ("inconclusive", run(FALLING)),
    "few samples": (
        "inconclusive",
        run(FALLING, FALLING, baseline=2.0, val_se=0.3),
    ),
    "negative": ("inconclusive", run(FALLING - 1, FALLING - 1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_verdict_has_a_run(name):
    verdict, (columns, options) = RUNS[name]
    found = diagnose(columns, **options)
    assert found.primary == verdict == found.findings[0].name
    assert all(recheck(finding) for finding in found.findings)
    assert str(found).endswith(found.findings[0].advice)
    assert repr(found).startswith(verdict)


def test_the_runs_cover_the_verdicts():
    verdicts = {rule.verdict for rule in RULES.values()}
    assert {verdict for verdict, _ in RUNS.values()} == verdicts - {"val_below_train"}


def test_the_sentence_has_the_numbers():
    columns, options = RUNS["rising"][1]
    found = diagnose(columns, **options)
    val = columns["val_loss"]
    best = min(val)
    assert str(found) == (
        f"overfitting since epoch {val.index(best) + 1}: the validation loss rose from "
        f"{best:.3g} to {val[-2]:.3g} (+{100 * (val[-2] / best - 1):.0f} %) while the "
        f"training loss kept falling. Stop earlier, regularise, or get more data."
    )
    assert (found.subtype, found.findings[0].severity) == ("val_rising", "severe")
    gap = RUNS["frozen gap"][1]
    assert diagnose(gap[0], **gap[1]).subtype == "gap"


def test_easier_validation_is_a_note():
    columns, options = run(FALLING + 0.6, FALLING, baseline=2.0)
    found = diagnose(columns, **options, frozen_train_loss=0.6, val_se=0.01)
    assert found.primary == "healthy"
    note = found.findings[-1]
    assert (note.name, note.severity) == ("val_below_train", "note")


def test_a_later_epoch_may_take_it_back():
    hump = [*RISING, *np.linspace(RISING[-1], 0.2, 40)]
    columns, options = run(3 * 0.95 ** np.arange(80), hump, baseline=2.0)
    assert diagnose(columns, **options, as_of_epoch=40).primary == "overfit"
    assert diagnose(columns, **options).primary not in ("overfit", "inconclusive")


def test_validation_every_few_epochs():
    columns, _ = run(FALLING)
    columns["val_loss"] = [None if t % 3 else v for t, v in enumerate(RISING, 1)]
    found = diagnose(columns, baseline=2.0)
    assert found.primary == "overfit"
    assert found.findings[0].evidence["best_epoch"] == 12
    columns["val_loss"] = [None if t % 6 else v for t, v in enumerate(RISING, 1)]
    assert "fewer than 8 validation" in diagnose(columns).skipped_rules["val_rising"]


def test_rules_that_lack_something_say_what():
    found = diagnose(run(FALLING)[0])
    assert found.skipped_rules["no_progress"] == "no baseline above the floor"
    assert found.skipped_rules["val_rising"] == "no validation loss"
    assert found.skipped_rules["leak_duplicates"] == "duplicates were not counted"


# --- what is taken --------------------------------------------------------------------


def test_a_history_a_result_and_columns_are_the_same():
    columns, _ = RUNS["rising"][1]
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    expected = diagnose(columns, baseline=2.0)
    history = History(rows)
    facts = Facts(baseline=(2.0, 2.0))
    assert diagnose(history, baseline=2.0) == expected
    assert diagnose(SimpleNamespace(history=history), baseline=2.0) == expected
    assert diagnose(SimpleNamespace(history=history, facts=facts)) == expected
    assert diagnose(History()).primary == "inconclusive"
    arrays = {name: np.array(column) for name, column in columns.items()}
    assert diagnose(arrays, baseline=2.0) == expected


def test_arguments_go_before_facts():
    columns, _ = RUNS["flat"][1]
    facts = Facts(baseline=(9.0, None), initial_val_loss=9.0)
    found = diagnose(columns, baseline=1.0, initial_val_loss=1.0, facts=facts)
    assert found.levels["baseline_train"] == found.levels["initial_val"] == 1.0
    assert found.primary == "no_progress"
    assert diagnose(columns, facts=facts).levels["baseline_train"] == 9.0


def test_what_was_measured_last_says_nothing_of_earlier_epochs():
    columns, _ = run(FALLING, FALLING)
    facts = Facts(output_std=0.0, output_mean=0.0)
    assert diagnose(columns, facts=facts).primary == "dead_input"
    assert diagnose(columns, facts=facts, as_of_epoch=39).primary != "dead_input"
    noted = Facts(first_nonfinite={"epoch": 30, "step": 299, "where": "the gradient"})
    found = diagnose(columns, facts=noted)
    assert str(found).startswith("not finite since epoch 30 (step 299): the gradient")
    assert diagnose(columns, facts=noted, as_of_epoch=29).primary != "nonfinite"


@pytest.mark.parametrize(
    ("kind", "message", "history", "options"),
    [
        (TypeError, "history=...", [1.0], {}),
        (ValueError, "'train_loss'", {"loss": [1.0]}, {}),
        (TypeError, "column of numbers", {"train_loss": 1.0}, {}),
        (TypeError, "column of numbers", {"train_loss": "1"}, {}),
        (TypeError, "epoch 2", {"train_loss": [1.0, "x"]}, {}),
        (TypeError, "epoch 1", {"train_loss": [10**400]}, {}),
        (ValueError, "train_loss of epoch 1", {"train_loss": [None]}, {}),
        (ValueError, "2 values", {"train_loss": [1.0], "val_loss": [1.0, 2.0]}, {}),
        (ValueError, "2 values", {"train_loss": [1.0]}, {"val_se": [1.0, 1.0]}),
        (ValueError, "at least 0", {"train_loss": [1.0]}, {"val_se": -1.0}),
        (ValueError, "must be finite", {"train_loss": [1.0]}, {"baseline": math.nan}),
        (ValueError, "below floor", {"train_loss": [1.0]}, {"baseline": -1.0}),
        (ValueError, "a pair", {"train_loss": [1.0]}, {"baseline": (1.0,)}),
        (TypeError, "baseline", {"train_loss": [1.0]}, {"baseline": "1"}),
        (ValueError, "must be finite", {"train_loss": [1.0]}, {"floor": math.inf}),
        (ValueError, "from 1 to 1", {"train_loss": [1.0]}, {"as_of_epoch": 2}),
        (TypeError, "an int", {"train_loss": [1.0]}, {"as_of_epoch": True}),
        (TypeError, "a Facts", {"train_loss": [1.0]}, {"facts": {}}),
        (TypeError, "n_val", {"train_loss": [1.0]}, {"facts": Facts(n_val="1")}),
        (ValueError, "a count", {"train_loss": [1.0]}, {"facts": Facts(n_val=-1)}),
        (TypeError, "pair", {"train_loss": [1.0]}, {"facts": Facts(baseline=1.0)}),
        (
            TypeError,
            "'epoch'",
            {"train_loss": [1.0]},
            {"facts": Facts(first_nonfinite={})},
        ),
    ],
)
def test_what_is_malformed_is_refused(kind, message, history, options):
    with pytest.raises(kind, match=message) as caught:
        diagnose(history, **options)
    assert "diagnose" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": [1]}'])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="to_json"):
        Diagnosis.from_json(text)


# --- laws -----------------------------------------------------------------------------

ANY = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, math.nan, math.inf, 5e-324]))
COLUMN = st.lists(ANY, max_size=30)
LEVEL = st.none() | ANY
COUNT = st.none() | st.integers(min_value=0)
PAIR = st.none() | st.tuples(ANY, LEVEL)
FACTS = st.builds(
    Facts, COUNT, COUNT, LEVEL, LEVEL, COUNT, COUNT, st.none(), PAIR, *[LEVEL] * 4
)


@given(
    st.data(),
    COLUMN,
    st.none() | st.lists(LEVEL, max_size=30),
    st.none() | st.floats() | st.tuples(ANY, LEVEL),
    LEVEL,
    st.just(0.0) | ANY,
    LEVEL,
    LEVEL,
    FACTS,
)
def test_anything_is_judged_or_refused(
    data, train, val, baseline, initial, floor, frozen, val_se, facts
):
    if val is not None and data.draw(st.booleans()):
        train = (train * 30)[: len(val)]
    columns = {"train_loss": train, "val_loss": val}
    refused = None
    try:
        found = diagnose(
            columns,
            baseline=baseline,
            initial_val_loss=initial,
            floor=floor,
            frozen_train_loss=frozen,
            val_se=val_se,
            facts=facts,
        )
        check(found)
    except (TypeError, ValueError) as error:
        refused = str(error)
    assert refused is None or refused.startswith("diagnose")


@given(st.data(), st.integers(8, 40))
def test_any_finite_curves_are_judged(data, n):
    finite = st.floats(min_value=0, allow_infinity=False)
    train, val = (data.draw(st.lists(finite, min_size=n, max_size=n)) for _ in "ab")
    level = data.draw(finite)
    columns = {"train_loss": train, "val_loss": val}
    check(diagnose(columns, baseline=level, val_se=level, frozen_train_loss=level))


def check(found):
    """All that is true of every diagnosis."""
    assert found.primary == found.findings[0].name
    assert all(recheck(finding) for finding in found.findings)
    assert Diagnosis.from_json(found.to_json()) == found
    for finding in found.findings:
        for value in finding.evidence.values():
            assert value is None or isinstance(value, (int, float, str))
    str(found), repr(found)


@st.composite
def runs(draw, rises=(0, 0, 2, 20)):
    """Columns and levels in whole numbers, which add and scale without rounding."""
    n = draw(st.integers(8, 60))
    t = np.arange(n)
    noise = st.lists(st.integers(-50, 50), min_size=n, max_size=n)
    size = draw(st.sampled_from([0.0, 0.1, 1.0]))
    columns = {}
    for name in ("train_loss", "val_loss"):
        fall = draw(st.integers(0, 2000)) * np.exp(-t / draw(st.floats(1, 40)))
        rise = draw(
            st.sampled_from(rises if name == "val_loss" else (0, 0, 2))
        ) * np.maximum(t - draw(st.integers(0, n)), 0)
        wobble = size * np.array(draw(noise))
        level = draw(st.integers(0, 400))
        columns[name] = [*map(float, np.maximum(fall + rise + wobble + level, 0) // 1)]
    optional = st.none() | st.integers(0, 2000).map(float)
    options = {
        "baseline": draw(optional),
        "initial_val_loss": draw(optional),
        "frozen_train_loss": draw(optional),
        "val_se": draw(st.none() | st.integers(0, 100).map(float)),
    }
    return columns, options


def essence(found):
    return [(f.name, f.rule, f.severity) for f in found.findings], found.skipped_rules


def moved(columns, options, change, change_se=lambda x: x):
    """A run whose losses are changed alike."""
    columns = {name: [*map(change, column)] for name, column in columns.items()}
    options = {
        name: x if x is None else change_se(x) if name == "val_se" else change(x)
        for name, x in {"floor": 0.0, **options}.items()
    }
    return diagnose(columns, **options)


@given(runs(), st.integers(-300, 300))
def test_the_unit_of_the_loss_does_not_matter(made, power):
    factor = 2.0**power
    scaled = moved(*made, lambda x: x * factor, lambda x: x * factor)
    assert essence(scaled) == essence(diagnose(made[0], **made[1]))


@given(runs(), st.integers(-5000, 5000))
def test_the_zero_of_the_loss_does_not_matter(made, shift):
    shifted = moved(*made, lambda x: x + shift)
    assert essence(shifted) == essence(diagnose(made[0], **made[1]))


@given(runs())
def test_a_diagnosis_follows_from_its_evidence_and_can_be_stored(made):
    columns, options = made
    before = copy.deepcopy(made)
    found = diagnose(columns, **options)
    assert made == before
    assert diagnose(columns, **options) == found
    check(found)
    json.loads(found.to_json())


@given(runs(rises=(10, 20, 40)), st.data())
def test_a_higher_tail_is_no_remedy(made, data):
    columns, options = made
    found = diagnose(columns, **options)
    assume(found.primary == "overfit")
    window = Curve(np.array(columns["val_loss"])).window
    rises = data.draw(st.lists(st.integers(0, 500), min_size=window, max_size=window))
    val = [*columns["val_loss"]]
    for at, rise in enumerate(rises, len(val) - window):
        val[at] += rise
    later = diagnose({**columns, "val_loss": val}, **options)
    if found.subtype == "val_rising":
        assert later.subtype == "val_rising"
    assert later.primary != "healthy"


@given(runs())
def test_a_loss_that_stays_below_its_best_is_not_rising(made):
    columns, options = made
    val = columns["val_loss"]
    best = val.index(min(val))
    val = [v + 1 for v in val[: best + 1]] + [val[best]] * (len(val) - best - 1)
    found = diagnose({**columns, "val_loss": val}, **options)
    assert "val_rising" not in {finding.rule for finding in found.findings}


@given(runs(), st.data())
def test_later_epochs_do_not_change_what_was_said(made, data):
    columns, options = made
    epoch = data.draw(st.integers(1, len(columns["train_loss"])))
    options["frozen_train_loss"] = None  # belongs to the last epoch
    early = {name: column[:epoch] for name, column in columns.items()}
    later = diagnose(columns, **options, as_of_epoch=epoch)
    assert later == diagnose(early, **options)


def measured(rule, columns, options):
    defaults = dict.fromkeys(("facts", "as_of_epoch"))
    given = {"floor": 0.0, **options}
    given["initial"] = given.pop("initial_val_loss")
    given["frozen"] = given.pop("frozen_train_loss")
    return RULES[rule].measure(_read(columns, **given, **defaults))


@given(runs(rises=(10, 20, 40)), st.randoms(use_true_random=False))
def test_the_order_before_the_best_epoch_does_not_change_the_rise(made, random):
    columns, options = made
    options["baseline"] = 1000.0  # otherwise the first loss is the scale
    val = columns["val_loss"]
    best = val.index(min(val))
    head = val[:best]
    assume(best < len(val) - Curve(np.array(val)).window)
    random.shuffle(head)
    mixed = {**columns, "val_loss": head + val[best:]}
    one, two = (measured("val_rising", c, options) for c in (columns, mixed))
    for name in ("rise", "best_epoch", "best_val", "tail_val", "train_rise"):
        assert one[name] == two[name]


@given(runs())
def test_more_validation_samples_change_the_standard_error_only(made):
    columns, options = made
    assume(options["val_se"] is not None)
    more = {**options, "val_se": options["val_se"] / 2}  # four times as many
    for rule in RULES:
        one, two = (measured(rule, columns, o) for o in (options, more))
        if isinstance(one, dict) and one.get("error") is not None:
            assert two.pop("error") == one.pop("error") / 2
        assert one == two


# --- statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 8))
def test_the_exact_test_counts_orders(n):
    scores = [
        sum(np.sign(b - a) for a, b in itertools.combinations(order, 2))
        for order in itertools.permutations(range(n))
    ]
    for score in range(n * (n - 1) // 2 + 1):
        exact = sum(abs(s) >= score for s in scores) / len(scores)
        assert _kendall_p(n, score) == exact


@pytest.mark.parametrize("n", [8, 9, 30, 250])
def test_trends_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    y = rng.standard_normal(n) + np.arange(n) / n
    found = _trend(y)
    assert found.slope == pytest.approx(stats.theilslopes(y)[0])
    method = "exact" if n < 10 else "asymptotic"
    tau = stats.kendalltau(np.arange(n), y, method=method)
    assert found.direction == np.sign(tau.statistic)
    # Theirs lacks the correction for continuity.
    assert found.p == pytest.approx(tau.pvalue, rel=1e-12 if n < 10 else 0.1)


def test_trends_with_ties_and_of_many_values():
    assert _trend(np.ones(20)) == (0.0, 1.0, 0)
    y = np.repeat(np.arange(10.0), 2)
    # Mann-Kendall: S = 180, and its variance as in Kendall (1975).
    variance = (20 * 19 * 45 - 10 * 2 * 1 * 9) / 18
    assert _trend(y).p == pytest.approx(2 * stats.norm.sf(179 / math.sqrt(variance)))
    long = _trend(3.0 * np.arange(10_000))
    assert long.slope == pytest.approx(3.0)
    assert long.clear == 1


@pytest.mark.parametrize("trend", [0.0, 5.0])
def test_noise_is_measured_on_top_of_a_trend(trend):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 2000)
    y = 0.1 * rng.standard_normal(2000) + trend * t**2
    assert _sigma(y) == pytest.approx(0.1, rel=0.1)
    assert _sigma(y, 5) == pytest.approx(0.1, rel=0.1)


# --- noise, and what it must not be taken for -----------------------------------------

# 500 curves, and 5,000 under the thorough profile.
CURVES = 5 * settings.default.max_examples


def correlated(rng, n, r):
    """AR(1) noise of variance 1."""
    x = rng.standard_normal(n)
    for t in range(1, n):
        x[t] = r * x[t - 1] + math.sqrt(1 - r * r) * x[t]
    return x


def plateaus(lengths):
    """Validation losses that stay where they are: 8 to 1000 epochs, noise to 5 %."""
    rng = np.random.default_rng(2026)
    for _ in range(CURVES):
        n = int(8 * 125 ** rng.random()) if lengths == "log" else rng.integers(8, 1001)
        noise, r = rng.uniform(0, 0.05), rng.uniform(0, 0.8)
        yield 1 + noise * correlated(rng, int(n), r)


def overfits(val):
    train = 1 / np.arange(1.0, len(val) + 1)
    return diagnose({"train_loss": train, "val_loss": val}).primary == "overfit"


def rises_in_a_row(count):
    def rule(val):
        ups = "".join("u" if up else "d" for up in np.diff(val) > 0)
        return "u" * count in ups

    return rule


def white_bound(val):
    """As if neither the noise were correlated nor the minimum a matter of luck."""
    n, window = len(val), Curve(val).window
    rise = np.median(val[-window:]) - val.min()
    z = stats.norm.ppf((n - 0.375) / (n + 0.25))
    bound = _sigma(val) * (z + 3 * 1.25 / math.sqrt(window))
    return 100 * rise / val.min() >= RISE and rise >= bound


@pytest.mark.parametrize("lengths", ["uniform", "log"])
def test_noise_on_a_plateau_is_not_overfitting(lengths):
    assert sum(map(overfits, plateaus(lengths))) <= 0.01 * CURVES


@pytest.mark.parametrize(
    ("rule", "at_least"),
    [
        pytest.param(rises_in_a_row(1), 0.99, id="one rising epoch"),
        pytest.param(lambda v: v.argmin() < len(v) - 10, 0.6, id="patience of 10"),
        pytest.param(rises_in_a_row(5), 0.3, id="five rising epochs"),
        pytest.param(white_bound, 0.15, id="a bound for white noise"),
    ],
)
def test_teeth_other_rules_take_it_for_overfitting(rule, at_least):
    assert sum(map(rule, plateaus("log"))) >= at_least * CURVES


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("n", [40, 200, 1000])
@pytest.mark.parametrize(("noise", "r"), [(0.0, 0.0), (0.02, 0.0), (0.01, 0.8)])
def test_losses_that_rise_by_half_are_seen(n, power, noise, r):
    rng = np.random.default_rng(n)
    t = np.linspace(0, 1, n)
    seen = 0
    for _ in range(20):
        best = rng.uniform(0.2, 0.5)
        rise = 0.25 * (np.maximum(t - best, 0) / (1 - best)) ** power
        val = 0.5 + 2 * np.exp(-t / 0.07) + rise
        seen += overfits(val + 0.5 * noise * correlated(rng, n, r))
    assert seen >= 19


def test_teeth_evidence_that_does_not_hold_is_seen():
    columns, options = RUNS["rising"][1]
    finding = diagnose(columns, **options).findings[0]
    for name, value in {"rise": 4.9, "noise": 1e3, "best_epoch": 40}.items():
        evidence = {**finding.evidence, name: value}
        assert not recheck(Finding("overfit", "mild", evidence, "", "val_rising"))


@pytest.mark.parametrize("law", ["unit", "zero"])
def test_teeth_a_threshold_that_has_a_unit_is_seen(monkeypatch, law):
    columns, options = RUNS["rising"][1]
    change = {"unit": lambda x: x / 64, "zero": lambda x: x + 64}[law]
    same = essence(diagnose(columns, **options))
    assert essence(moved(columns, options, change)) == same
    wrong = {
        "unit": lambda e: e["tail_val"] - e["best_val"] >= 0.1,
        "zero": lambda e: e["tail_val"] >= 1.1 * e["best_val"],
    }[law]
    rule = RULES["val_rising"]._replace(holds=wrong)
    monkeypatch.setitem(RULES, "val_rising", rule)
    assert essence(diagnose(columns, **options)) == same
    assert essence(moved(columns, options, change)) != same
