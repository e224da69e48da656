"""The command line: `python -m lossloop demo`, `verify` and `bench`."""

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from lossloop._demo import demo


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Instead of those of the process.

    Returns:
        The exit status: 1 if `verify` finds a law broken, 2 if it could not check,
        otherwise 0.
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
    command.set_defaults(run=_demo)
    command = commands.add_parser(
        "verify",
        help="check the laws of exact, pure training on a loss or step of your own",
        description="Checks that the mean loss does not depend on how the data are "
        "split, that the step is pure and repeatable, that compiled it does the same, "
        "and more, and prints a table. Exit status: 0 if no law is broken, 1 if one "
        "is, 2 if the laws could not be checked.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "factory",
        metavar="module:function",
        help="a function without arguments that returns (objective, data), or a "
        "dictionary with the arguments of lossloop.testing.verify",
    )
    command.add_argument(
        "--examples", type=_at_least_one, default=50, help="to try of each law"
    )
    command.add_argument(
        "--backend", default="inductor", help="of torch.compile, like aot_eager"
    )
    command.set_defaults(run=_verify)
    command = commands.add_parser(
        "bench",
        help="time fit beside the loop of every tutorial",
        description="Trains four small models with fit, eager and compiled, and with "
        "the loop that every tutorial writes, by turns and on one thread, and prints "
        "the time per step of the best epochs. Takes some minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--work", action="append", help="its name; may be given again (default: all)"
    )
    command.add_argument("--epochs", type=_at_least_one, default=10)
    command.add_argument("--threads", type=_at_least_one, default=1)
    command.set_defaults(run=_bench)
    options = parser.parse_args(arguments)
    return options.run(command, options)


def _demo(command: argparse.ArgumentParser, options: Any) -> int:
    if not options.out.parent.is_dir():
        command.error(f"--out: there is no folder {options.out.parent}")
    print(demo(options.epochs, options.device, options.out))  # noqa: T201
    return 0


def _verify(command: argparse.ArgumentParser, options: Any) -> int:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    with tempfile.TemporaryDirectory() as folder:
        if "hypothesis" not in sys.modules:  # it would leave a folder here
            os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", folder)
        try:
            # Imported late, because the demo does not need hypothesis.
            from lossloop.testing import verify
            from lossloop.testing._factory import made_by

            made = {"factory": options.factory, **made_by(options.factory)}
            made = {"examples": options.examples, "backend": options.backend, **made}
            report = verify(**made)
        except (ValueError, TypeError, ImportError) as error:
            command.exit(2, f"error: {error}\n")
        except Exception:  # of the subject; 1 would say that a law is broken
            traceback.print_exc()
            return 2
    print(report)  # noqa: T201
    if any(row.result == "broken" for row in report.rows):
        return 1
    return 0 if report.held else 2


def _bench(command: argparse.ArgumentParser, options: Any) -> int:
    # Imported late: it takes the back end of torch.compile along.
    from lossloop._pace import time_works, works_table

    torch.set_num_threads(options.threads)
    try:
        paces = time_works(options.work, epochs=options.epochs)
    except ValueError as error:
        command.exit(2, f"error: {error}\n")
    print(works_table(paces))  # noqa: T201
    return 0


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
    sys.exit(main())
