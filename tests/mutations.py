"""Takes each safeguard out of a copy of lossloop, and looks whether a test fails.

`python tests/mutations.py [WORD ...]` tries those whose name has one of the words, or
all. It ends with status 1 if one survives: then a test is missing. That the list still
fits the code is tested by `test_mutations.py`.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

HOME = Path(__file__).resolve().parent.parent
WRONG_COPY = 99


class Mutation(NamedTuple):
    """One place in the source, what stands there instead, and who is to notice."""

    name: str
    file: str  # of lossloop
    old: str  # is there exactly once
    new: str
    tests: str  # of pytest, separated by spaces


FILES, CHECKPOINT = "tests/test_files.py::", "tests/test_checkpoint.py::"
NONFINITE, BEST = "tests/test_nonfinite.py::", "tests/test_best.py::"
DOORS, SCAN = "tests/test_doors.py::", "tests/test_scan.py::"
HELD = f"{SCAN}test_module_and_optimizer_hold_the_last_finished_epoch"
KEPT = f"{SCAN}test_a_state_that_is_to_be_kept_is_not_written_to"
IN_STEP = f"{NONFINITE}test_a_step_that_is_not_finite_is_named_and_changes_nothing"
OWN_STEP = f"{NONFINITE}test_a_step_of_ones_own_changes_nothing_once_its_gate_is_closed"
IN_STATE = f"{NONFINITE}test_a_state_that_is_not_finite_ends_the_epoch_and_is_not_kept"
SAVED = f"{NONFINITE}test_with_a_save_each_step_a_state_is_told_exactly_and_never_saved"
GENERATED = f"{BEST}test_the_best_is_the_first_lowest_of_the_finite"
LEFT = f"{DOORS}test_no_run_changes_what_belongs_to_the_process"
POWER = f"{FILES}test_a_loss_of_power_leaves_the_old_or_the_new"
TOLD = f"{FILES}test_the_system_is_told_to_sync_the_file_and_then_its_directory"

MUTATIONS = [
    # Files are written whole, and brought to the disk.
    Mutation(
        "fsync of a file",
        "_files.py",
        "        files.fsync(opened)\n",
        "",
        f"{POWER}[saved_over]",
    ),
    Mutation(
        "fsync of its directory",
        "_files.py",
        "        files.fsync_directory(directory)\n",
        "",
        f"{POWER}[saved_over]",
    ),
    Mutation(
        "system's fsync of a file",
        "_files.py",
        "        os.fsync(fd)\n\n",
        "        pass\n\n",
        TOLD,
    ),
    Mutation(
        "system's fsync of a directory",
        "_files.py",
        "            os.fsync(fd)\n        finally",
        "            pass\n        finally",
        TOLD,
    ),
    Mutation(
        "fsync of a new directory's parent",
        "_checkpoint.py",
        "            files.fsync_directory(str(each.parent))\n",
        "            pass\n",
        TOLD,
    ),
    Mutation(
        "replace in one step",
        "_files.py",
        "        files.replace(temporary, path)\n",
        "        if os.path.exists(path):\n"
        "            files.unlink(path)\n"
        "        files.replace(temporary, path)\n",
        f"{FILES}test_a_crash_at_any_operation_leaves_the_old_or_the_new",
    ),
    Mutation(
        "another name until it is whole",
        "_files.py",
        "    temporary = os.path.join(directory, name)\n",
        "    temporary = path\n",
        f"{FILES}test_a_crash_at_any_operation_leaves_the_old_or_the_new",
    ),
    Mutation(
        "a file that is there is not opened",
        "_files.py",
        "os.O_CREAT | os.O_EXCL | os.O_WRONLY",
        "os.O_CREAT | os.O_WRONLY",
        f"{FILES}test_a_file_that_is_there_is_not_written_into",
    ),
    Mutation(
        "the rest of a short write",
        "_files.py",
        "                rest = rest[files.write(opened, rest) :]\n",
        "                files.write(opened, rest)\n                break\n",
        f"{FILES}test_what_one_call_does_not_write_the_next_does",
    ),
    Mutation(
        "nothing is left of a failed save",
        "_files.py",
        "                files.unlink(temporary)\n",
        "                pass\n",
        f"{FILES}test_a_failing_disk_leaves_the_old_and_no_rubbish",
    ),
    Mutation(
        "nothing is left of dead processes",
        "_checkpoint.py",
        "                        self._files.unlink("
        "os.path.join(self.directory, name))\n",
        "                        pass\n",
        f"{CHECKPOINT}test_what_dead_processes_left_is_removed",
    ),
    # Checkpoints.
    Mutation(
        "checksum",
        "_checkpoint.py",
        "            if seen.hexdigest() != digest:\n",
        "            if False:\n",
        f"{CHECKPOINT}test_teeth_only_the_checksum_sees_a_changed_weight",
    ),
    Mutation(
        "checksum of the header",
        "_checkpoint.py",
        "        digest = hashlib.sha256(length + header)\n",
        "        digest = hashlib.sha256()\n",
        f"{CHECKPOINT}test_a_whole_run_comes_back",
    ),
    Mutation(
        "size of the file",
        "_checkpoint.py",
        "            if end != payload:\n",
        "            if end > payload:\n",
        f"{CHECKPOINT}test_bytes_at_the_end_are_refused",
    ),
    Mutation(
        "copy of what is written in the background",
        "_checkpoint.py",
        "        packed = _Packed(run, copy=True)\n",
        "        packed = _Packed(run, copy=False)\n",
        f"{CHECKPOINT}test_the_caller_goes_on_while_a_copy_is_written",
    ),
    Mutation(
        "damaged ones do not count",
        "_checkpoint.py",
        "                elif self._is_whole(name, path):\n",
        "                else:\n",
        f"{CHECKPOINT}test_damaged_ones_do_not_count_among_those_kept",
    ),
    Mutation(
        "too many are deleted",
        "_checkpoint.py",
        "                    self._files.unlink(path)\n",
        "                    pass\n",
        f"{CHECKPOINT}test_the_newest_are_kept",
    ),
    Mutation(
        "newest first",
        "_checkpoint.py",
        "    return sorted(order, key=order.__getitem__, reverse=True)\n",
        "    return sorted(order, key=order.__getitem__)\n",
        f"{CHECKPOINT}test_the_newest_are_kept",
    ),
    Mutation(
        "lock",
        "_checkpoint.py",
        "            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        f"{CHECKPOINT}test_a_second_run_is_refused",
    ),
    Mutation(
        "lock is not inherited",
        "_checkpoint.py",
        "    os.register_at_fork(after_in_child=_let_go)\n",
        "    pass\n",
        f"{CHECKPOINT}test_a_killed_run_gives_its_directory_back",
    ),
    Mutation(
        "the end of the lock waits",
        "_checkpoint.py",
        "        else:\n            self.wait()\n",
        "        else:\n            pass\n",
        f"{CHECKPOINT}test_the_caller_goes_on_while_a_copy_is_written",
    ),
    # What is not finite.
    Mutation(
        "gate",
        "_step.py",
        "            if not seen_finite(loss_sum, looked_at):\n",
        "            if False:\n",
        f"{IN_STEP}[gradient-middle-nan]",
    ),
    Mutation(
        "gate looks at gradients",
        "_step.py",
        "            if not seen_finite(loss_sum, looked_at):\n",
        "            if not seen_finite(loss_sum, []):\n",
        f"{IN_STEP}[gradient-middle-nan]",
    ),
    Mutation(
        "gate looks at the loss",
        "_gate.py",
        "torch.stack(norms).sum() + loss_sum):\n",
        "torch.stack(norms).sum()):\n",
        f"{IN_STEP}[loss-middle-nan]",
    ),
    Mutation(
        "gate, once closed",
        "_step.py",
        "            if gate.skipped > gate.allowed:\n",
        "            if False:\n",
        f"{OWN_STEP}[gradient-True]",
    ),
    Mutation(
        "compiled gate looks at gradients",
        "_step.py",
        "        good = torch.isfinite(grand_total(loss_sum, looked_at))\n",
        "        good = torch.isfinite(loss_sum)\n",
        f"{OWN_STEP}[gradient-False]",
    ),
    Mutation(
        "compiled gate looks at the loss",
        "_gate.py",
        "    return sum(sums, loss_sum)\n",
        "    return sum(sums)\n",
        f"{OWN_STEP}[loss-False]",
    ),
    Mutation(
        "compiled gate keeps the state",
        "_step.py",
        "                return torch.where(passes, new, old)\n",
        "                return new\n",
        f"{OWN_STEP}[gradient-False]",
    ),
    Mutation(
        "compiled gate, once closed",
        "_gate.py",
        "    return opened & good, ",
        "    return good, ",
        f"{OWN_STEP}[gradient-False]",
    ),
    Mutation(
        "folded steps are looked at in the end",
        "_scan.py",
        "            finite = torch.isfinite(grand_total(total, looked_at))\n",
        "            finite = torch.isfinite(torch.zeros(()))\n",
        f"{NONFINITE}test_compiled[True]",
    ),
    Mutation(
        "moments of an optimizer instance are kept",
        "_training.py",
        "keep=self._kept is not None",
        "keep=False",
        f"{HELD}[in-unseen-odd_batch]",
    ),
    Mutation(
        "what nobody saw is written after an error",
        "_training.py",
        "                if self._kept is not None:\n",
        "                if False:\n",
        f"{HELD}[after-unseen-odd_batch]",
    ),
    Mutation(
        "what nobody saw is written at the end",
        "_training.py",
        "or self._kept or interrupted",
        "or interrupted",
        f"{SCAN}test_the_result_has_a_state_of_its_own",
    ),
    Mutation(
        "validation sees the weights of the last epoch",
        "_training.py",
        "if self._kept is None or self.measured:",
        "if self._kept is None:",
        f"{SCAN}test_who_looks_between_epochs_sees_the_last_one[validated]",
    ),
    Mutation(
        "a step that is made again keeps the state",
        "_scan.py",
        "self._kept = False, keep\n",
        "self._kept = False, False\n",
        f"{KEPT}[left_out]",
    ),
    Mutation(
        "state is looked at after an epoch",
        "_training.py",
        "            self._check_state(self.opt_state)\n        gate = ",
        "            pass\n        gate = ",
        f"{IN_STATE}[buffer-middle-nan]",
    ),
    Mutation(
        "state is looked at after a step that was skipped",
        "_training.py",
        "            self._check_state(opt_state)\n            self._passed = ",
        "            self._passed = ",
        f"{IN_STATE}[parameter-middle-nan]",
    ),
    Mutation(
        "state is looked at before it is saved",
        "_training.py",
        "            self._check_state(opt_state)\n            now = ",
        "            now = ",
        f"{SAVED}[buffer-middle-nan]",
    ),
    # The best and the last weights.
    Mutation(
        "copy of the best weights",
        "_training.py",
        "            copy = {name: t.clone() for name, t in weights.items()}\n",
        "            copy = dict(weights)\n",
        GENERATED,
    ),
    Mutation(
        "the best is finite",
        "_training.py",
        "and math.isfinite(loss) ",
        "",
        GENERATED,
    ),
    Mutation(
        "the best is the first of equals",
        "_training.py",
        "and loss < lowest",
        "and loss <= lowest",
        GENERATED,
    ),
    Mutation(
        "the best weights are put back",
        "_training.py",
        "            final = self.best.params\n",
        "            pass\n",
        GENERATED,
    ),
    Mutation(
        "no best is an error",
        "_training.py",
        "            final = None\n",
        "            pass\n",
        GENERATED,
    ),
    Mutation(
        "the best of a run that is resumed",
        "_training.py",
        ", saved.best\n",
        ", None\n",
        f"{BEST}test_the_best_of_a_run_that_was_resumed",
    ),
    Mutation(
        "the module holds the last finished epoch",
        "_training.py",
        "        copy_tensors(targets, sources)\n",
        "",
        f"{IN_STEP}[gradient-last-nan]",
    ),
    Mutation(
        "the optimizer does so too",
        "_training.py",
        "        if self._kept is None and self._copied:\n",
        "        if False:\n",
        f"{NONFINITE}test_an_instance_of_torch_holds_the_last_finished_epoch_too",
    ),
    # What belongs to the caller.
    Mutation(
        "handlers of signals are put back",
        "_interruption.py",
        "            signal.signal(number, handler)\n",
        "            pass\n",
        f"{LEFT}[finished-defaults]",
    ),
    Mutation(
        "handlers that are no defaults are left alone",
        "_interruption.py",
        "                if handler in _DEFAULTS:\n",
        "                if True:\n",
        "tests/test_interruption.py::test_a_handler_of_the_callers_is_left_alone",
    ),
    Mutation(
        "a second signal is heeded",
        "_interruption.py",
        "            raise KeyboardInterrupt\n",
        "            return\n",
        "tests/test_interruption.py",
    ),
    Mutation(
        "the generator is put back after a step",
        "_random.py",
        "            generator.set_state(state)\n",
        "            pass\n",
        f"{LEFT}[dropout-defaults]",
    ),
    Mutation(
        "generators are put back after a refusal",
        "_fit.py",
        "        generators.put_back(train)\n        raise\n",
        "        raise\n",
        f"{DOORS}test_refused_by_name_and_nothing_changed",
    ),
    Mutation(
        "generators are put back after an error was looked for",
        "_training.py",
        "        with generators_kept(train):\n",
        "        if True:\n",
        f"{NONFINITE}test_looking_for_what_was_not_finite_moves_no_generator",
    ),
    Mutation(
        "rates are put back after an error",
        "_training.py",
        "                self.schedule.restore()\n",
        "                pass\n",
        "tests/test_fit.py::"
        "test_after_an_interruption_everything_is_at_the_last_finished_epoch",
    ),
    Mutation(
        "modes are a copy's",
        "_model.py",
        "        copied = copy.deepcopy(model, memo)\n",
        "        copied = model\n",
        f"{LEFT}[finished-defaults]",
    ),
    Mutation(
        "gradients are off in steps alone",
        "_fold.py",
        "        with torch.no_grad():  # not around the loader",
        "        torch.set_grad_enabled(False)\n        if True:  #",
        f"{LEFT}[finished-defaults]",
    ),
]


def mutated(mutation: Mutation, package: Path = HOME / "lossloop") -> str:
    """The source with it."""
    source = (package / mutation.file).read_text()
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"{mutation.name!r}: its text is {count} times in {mutation.file}, and not "
            f"once: {mutation.old!r}. Write down what stands there now."
        )
    return source.replace(mutation.old, mutation.new)


def outcome(home: Path, tests: list[str]) -> tuple[int, str]:
    """The status of these tests in a copy, and what they printed.

    In a forked process: what is slow to import is imported once.
    """
    printed = home / "printed"
    child = multiprocessing.get_context("fork").Process(
        target=_run, args=(home, tests, printed)
    )
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode, printed.read_text()


def _run(home: Path, tests: list[str], printed: Path) -> None:
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(home)
    here = {str(HOME), str(HOME / "tests"), ""}
    sys.path[:] = [str(home), *(path for path in sys.path if path not in here)]
    options = ["-o", "addopts=", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    status = pytest.main([*options, *tests])
    found = sys.modules.get("lossloop")
    if found is None or Path(str(found.__file__)).parent != home / "lossloop":
        status = WRONG_COPY
    sys.exit(int(status))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    words = parser.parse_args().words
    assert "lossloop" not in sys.modules
    os.environ["HYPOTHESIS_PROFILE"] = "unshrunk"
    sys.dont_write_bytecode = True
    importlib.import_module("torch._dynamo")  # before it is forked
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    sources = {mutation: mutated(mutation) for mutation in chosen}
    missed = []
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory).resolve()
        for name in ("lossloop", "tests"):
            shutil.copytree(
                HOME / name, home / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(HOME / "pyproject.toml", home)
        tests = list(dict.fromkeys(t for m in chosen for t in m.tests.split()))
        status, output = outcome(home, tests)
        if status:
            print(output[-3000:])  # noqa: T201
            print("Without a mutation, these tests must pass.")  # noqa: T201
            return 1
        for mutation, source in sources.items():
            path = home / "lossloop" / mutation.file
            before = path.read_text()
            path.write_text(source)
            status, output = outcome(home, mutation.tests.split())
            path.write_text(before)
            # A status of more than 1 is no test that failed, but an error of pytest.
            found = {0: "SURVIVED", 1: "caught"}.get(
                status, f"pytest ended with {status}"
            )
            print(f"{found:10}{mutation.name}", flush=True)  # noqa: T201
            if status != 1:
                missed.append(mutation.name)
                print(output[-2000:] if status else "", end="")  # noqa: T201
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
