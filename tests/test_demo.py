"""The demo, as a new user runs it."""

import re
import subprocess
import sys
from time import perf_counter

import pytest

from lossloop.__main__ import main


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    """With a cold cache of the compiler: 97 % within a minute."""
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "lossloop", "demo"],
        cwd=tmp_path,
        env={
            "PATH": "",
            "HOME": str(tmp_path),
            "MPLCONFIGDIR": str(tmp_path),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = perf_counter() - start
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Epoch")]
    assert len(lines) == 20
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(
            rf"Epoch +{number}/20  train_loss [\d.]+ +val_loss [\d.]+ +"
            r"val_accuracy [\d.]+ +lr [-\de.]+ +[\d.]+ s of training",
            line,
        )
    assert "healthy" in done.stdout
    best = re.search(r"Best epoch \d+: accuracy (\d+\.\d\d) %", done.stdout)
    assert best is not None
    assert float(best[1]) >= 97
    picture = (tmp_path / "lossloop-demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert seconds < 60


def test_options(tmp_path, capsys):
    main(["demo", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    assert capsys.readouterr().out.startswith("Epoch 1/1  train_loss")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "at least 1, got 0"),
        (["--epochs", "many"], "invalid"),
        (["--device", "abacus"], "abacus"),
        (["--out", "/no/such/folder/a.png"], "no folder /no/such/folder"),
    ],
)
def test_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert words in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--epochs", "--device", "--out"))
