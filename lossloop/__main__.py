"""The command line: `python -m lossloop demo`."""

import argparse
from pathlib import Path

import torch

from lossloop._demo import demo


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: Instead of those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lossloop",
        description="Training as a fold of one compiled pure function.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "demo",
        help="train a small conv net on handwritten digits",
        description="Trains a small conv net on scikit-learn's handwritten digits, "
        "prints a line per epoch, says what the two loss curves mean, and draws them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--epochs", type=_at_least_one, default=20)
    command.add_argument("--device", type=_device, default=torch.device("cpu"))
    command.add_argument(
        "--out", type=Path, default=Path("lossloop-demo.png"), help="picture to write"
    )
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    print(demo(options.epochs, options.device, options.out))  # noqa: T201


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: {error}") from error
    return device


if __name__ == "__main__":
    main()
