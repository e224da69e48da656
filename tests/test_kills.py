"""T3: processes that are killed at any time, and a run that ends as if none had been.

Random kills find no rare windows: with none of 200 wrong, up to 1.5 % may be. Those are
enumerated in `test_files`.
"""

import os

import killing
import pytest

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
KILLS = {"eager": 109, "workers": 8, "compiled": 80}
if LONG:
    KILLS = {"eager": 1290, "workers": 80, "compiled": 400, "folded": 200}
FRESH = 30 if LONG else 3


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    with killing.served(lambda: tmp_path_factory.mktemp("runs")) as asked:
        yield asked


def test_there_are_200_kills_and_2000_at_night():
    assert sum(KILLS.values()) + FRESH == (2000 if LONG else 200)


@pytest.mark.parametrize("kind", KILLS)
def test_killed_at_any_time(kind, campaign):
    answer = campaign(kind=kind, count=KILLS[kind])
    assert answer["ends"] == {"exit -9": KILLS[kind]}
    assert sum(answer["stages"].values()) == KILLS[kind]
    assert answer["same"] == answer["runs"] > KILLS[kind] / 20
    if kind != "workers":
        assert all(answer["stages"].values())
        assert answer["places"] > 10


def test_killed_in_fresh_processes(campaign):
    answer = campaign(kind="eager", count=FRESH, fresh=True)
    assert answer["ends"] == {"exit -9": FRESH}
    assert answer["same"] == answer["runs"]


@pytest.mark.parametrize(
    "broken", ["mean", "weights", "history", "best", "place", None]
)
def test_teeth_what_is_not_taken_up_again_is_seen(broken, campaign):
    answer = campaign(kind="eager", count=1, saves=8, broken=broken)
    assert answer["runs"] == 1
    assert answer["same"] == (broken is None)
