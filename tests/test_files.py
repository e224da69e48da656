"""Files that are there whole or not at all: crashes, losses of power, full disks."""

import errno
import itertools
import multiprocessing
import os
import stat
import warnings

import pytest
import torch
from disk import Crash, Disk, after_power_loss, contents

from lossloop import _checkpoint
from lossloop._checkpoint import Checkpoints, load, save
from lossloop._files import CheckpointWriteError, Files, is_left_over, write_file
from lossloop._history import History
from lossloop._run import Run

# So that a checkpoint takes many writes.
SHORT = 100

fork = multiprocessing.get_context("fork")


def run(epoch):
    params = {"weight": torch.full((2, 3), float(epoch)), "bias": torch.ones(2)}
    history = History([{"epoch": n, "train_loss": 1 / n} for n in range(1, epoch + 1)])
    return Run(params, (torch.tensor(epoch),), epoch, history=history)


def save_with(disk, epoch, directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checkpoint, "DISK", disk)
        save(run(epoch), directory / "run.safetensors")


def saved_first(directory, disk):
    """What may be there meanwhile, what has to be there in the end, and the save."""
    return {None, 1}, 1, lambda: save_with(disk, 1, directory)


def saved_over(directory, disk):
    save(run(1), directory / "run.safetensors")
    return {1, 2}, 2, lambda: save_with(disk, 2, directory)


def pruned(directory, disk):
    checkpoints = Checkpoints(directory)
    checkpoints.save(run(1))
    checkpoints.save(run(2))
    later = Checkpoints(directory, disk)
    return {2, 3}, 3, lambda: later.save(run(3))


SAVES = pytest.mark.parametrize("scenario", [saved_first, saved_over, pruned])


def loaded(directory):
    """The epoch of what is there, all of it being as it was saved; or None."""
    path = directory / "run.safetensors"
    try:
        found = load(path if path.exists() else directory)
    except FileNotFoundError:
        return None
    expected = run(found.epoch)
    assert all(torch.equal(found.params[n], t) for n, t in expected.params.items())
    assert list(found.history) == list(expected.history)
    return found.epoch


@SAVES
@pytest.mark.parametrize("when", ["before", "torn", "after"])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(scenario, when, tmp_path):
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        directory.mkdir()
        disk = Disk(at, when, most=SHORT)
        states, new, act = scenario(directory, disk)
        try:
            act()
        except Crash:
            assert loaded(directory) in states
        else:
            break
    assert loaded(directory) == new
    assert at == len(disk.calls) + 1 > 10
    assert set(disk.calls) >= {"create", "write", "fsync", "replace", "fsync_directory"}


def broken_by_power_loss(scenario, directory, scratch, without=()):
    """The states after a loss of power that are neither the old nor the new one."""
    disk = Disk(without=without, most=SHORT)
    directory.mkdir()
    states, new, act = scenario(directory, disk)
    before = contents(directory)
    act()
    scratch.mkdir()
    broken, looked_at, seen = [], 0, {}
    for end in range(len(disk.log) + 1):
        for state in after_power_loss(before, disk.log[:end]):
            looked_at += 1
            files = {n: data for n, data in state.items() if not n.startswith(".")}
            key = tuple(sorted(files.items()))
            if key not in seen:
                for path in scratch.iterdir():
                    path.unlink()
                for name, data in files.items():
                    (scratch / name).write_bytes(data)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of what was skipped
                        seen[key] = loaded(scratch)
                except ValueError:
                    seen[key] = "damaged"
            if seen[key] not in (states if end < len(disk.log) else {new}):
                broken.append(seen[key])
    assert looked_at > 1000
    return broken


@SAVES
def test_a_loss_of_power_leaves_the_old_or_the_new(scenario, tmp_path):
    broken = broken_by_power_loss(scenario, tmp_path / "run", tmp_path / "after")
    assert broken == []


@SAVES
@pytest.mark.parametrize("missing", ["fsync", "fsync_directory"])
def test_teeth_a_missing_fsync_is_seen(scenario, missing, tmp_path):
    assert broken_by_power_loss(
        scenario, tmp_path / "run", tmp_path / "after", {missing}
    )


def test_teeth_deleting_before_writing_is_seen(tmp_path, monkeypatch):
    def deleting(path, chunks, files):
        if os.path.exists(path):
            files.unlink(path)
        fd = files.create(path)
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while rest:
                rest = rest[files.write(fd, rest) :]
        files.fsync(fd)
        files.close(fd)
        files.fsync_directory(os.path.dirname(path))

    monkeypatch.setattr(_checkpoint, "write_file", deleting)
    broken = broken_by_power_loss(saved_over, tmp_path / "run", tmp_path / "after")
    assert {None, "damaged"} == set(broken)


@SAVES
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failing_disk_leaves_the_old_and_no_rubbish(scenario, code, tmp_path):
    refused = set()
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        directory.mkdir()
        disk = Disk(at, code)
        states, new, act = scenario(directory, disk)
        before = contents(directory)
        caught = None
        try:
            act()
        except CheckpointWriteError as error:
            caught = error
        if caught is not None:
            refused.add(disk.calls[at - 1])
            assert caught.errno == code
            assert "intact" in str(caught)
            assert "safetensors" in caught.filename
            if disk.calls[at - 1] != "fsync_directory":
                assert contents(directory) == before
            assert loaded(directory) in states
            assert disk.calls.count("fsync") <= 1, "a failed fsync is not tried again"
        else:
            assert loaded(directory) == new
        assert not [name for name in os.listdir(directory) if name.startswith(".tmp")]
        if at > len(disk.calls):
            break
    assert refused == {
        *("create", "write", "fsync", "close", "replace", "fsync_directory")
    }


def test_what_one_call_does_not_write_the_next_does(tmp_path):
    disk = Disk(most=7)
    write_file(str(tmp_path / "file"), [b"", bytes(range(100)), b"x"], disk)
    assert (tmp_path / "file").read_bytes() == bytes(range(100)) + b"x"
    assert disk.calls.count("write") == 16


def test_the_system_is_told_to_sync_the_file_and_then_its_directory(
    tmp_path, monkeypatch
):
    """Not only the simulated disk; a directory that is made has a name too."""
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(
        os, "replace", lambda *paths: synced.append("replace") or replace(*paths)
    )
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    assert set(synced) == {p.stat().st_ino for p in (tmp_path, tmp_path / "a")}
    synced.clear()
    checkpoints.save(run(1))
    [file] = (tmp_path / "a" / "b").iterdir()
    assert synced == [file.stat().st_ino, "replace", file.parent.stat().st_ino]


def test_a_file_that_is_there_is_not_written_into(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        Files().create(str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"old"


def test_an_exception_on_the_way_is_passed_on_and_leaves_nothing(tmp_path):
    def chunks():
        yield b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(str(tmp_path / "file"), chunks())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_the_mode_of_a_file_is_what_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        save(run(1), tmp_path / "run.safetensors")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "run.safetensors").stat().st_mode)
    assert mode == 0o666 & ~umask


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointWriteError, match="nowhere") as caught:
        save(run(1), tmp_path / "nowhere" / "run.safetensors")
    assert caught.value.errno == errno.ENOENT


def saves_many(number, directory, count):
    torch.set_num_threads(1)
    for n in range(1, count + 1):
        save(run(number), directory / "run.safetensors")
        assert load(directory / "run.safetensors").epoch in (1, 2)
        save(run(number), directory / f"ckpt-{n:06}-{number:08}.safetensors")


def test_two_processes_save_and_every_file_is_whole(tmp_path):
    writers = [fork.Process(target=saves_many, args=(n, tmp_path, 100)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        seen += loaded(tmp_path) is not None
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen > 10
    files = sorted(tmp_path.iterdir())
    assert len(files) == 201
    assert {load(path).epoch for path in files} == {1, 2}


def test_what_dead_processes_left_is_known(tmp_path):
    dead = fork.Process(target=os.getpid)
    dead.start()
    dead.join()
    assert is_left_over(f".tmp-{dead.pid}-01234567-89abcdef")
    assert not is_left_over(f".tmp-{os.getppid()}-01234567-89abcdef")
    assert not is_left_over(".tmp-mine")
    # This process had its number from another one, which is dead.
    assert is_left_over(f".tmp-{os.getpid()}-01234567-89abcdef")
    disk = Disk()
    write_file(str(tmp_path / "file"), [b"data"], disk)
    own = disk.log[0][2]
    assert own.startswith(f".tmp-{os.getpid()}-")
    assert not is_left_over(own)
