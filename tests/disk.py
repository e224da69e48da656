"""A disk that fails where it is told to, and can tell what a loss of power leaves."""

import itertools
import os
import random

from lossloop._files import Files


class Crash(BaseException):
    """The process is dead: nothing that it tries to do happens any more."""


class Disk(Files):
    """Passes the calls on to the system, and keeps a log of them.

    Args:
        at: The number of the operation, from 1, at which something happens.
        when: What: the process dies "before" it, "torn" (in the middle of it), or
            "after" it; or an `errno`, with which it fails.
        without: Calls that do nothing, as if they were missing in the code.
        most: Bytes that one call writes at most.
    """

    def __init__(self, at=0, when="before", without=(), most=None):
        self.at, self.when, self.without, self.most = at, when, without, most
        self.calls = []
        self.log = []
        self.dead = False
        self.opened = {}  # file descriptor: [number of the file, its size]
        self.names = {}

    def _do(self, name, call, torn=lambda: None):
        if self.dead:
            raise Crash
        self.calls.append(name)
        here = len(self.calls) == self.at
        if here and isinstance(self.when, int):
            raise OSError(self.when, os.strerror(self.when))
        if here and self.when != "after":
            if self.when == "torn":
                torn()
            self._die()
        result = None if name in self.without else call()
        if here:
            self._die()
        return result

    def _die(self):
        self.dead = True
        for fd in self.opened:
            os.close(fd)
        raise Crash

    def _note(self, name, *about):
        if name not in self.without:
            self.log.append((name, *about))

    def create(self, path):
        def call():
            fd = super(Disk, self).create(path)
            number = len(self.log)
            self.opened[fd] = [number, 0]
            self.names[os.path.basename(path)] = number
            self._note("create", number, os.path.basename(path))
            return fd

        return self._do("create", call)

    def write(self, fd, data):
        def call(data=data):
            data = data[: self.most]
            count = super(Disk, self).write(fd, data)
            assert count == len(data)
            number, size = self.opened[fd]
            self._note("write", number, size, bytes(data))
            self.opened[fd][1] += count
            return count

        return self._do("write", call, lambda: call(data[: len(data) // 2]))

    def fsync(self, fd):
        def call():
            super(Disk, self).fsync(fd)
            self._note("fsync", self.opened[fd][0])

        return self._do("fsync", call)

    def close(self, fd):
        def call():
            super(Disk, self).close(fd)
            del self.opened[fd]

        return self._do("close", call)

    def replace(self, source, target):
        def call():
            super(Disk, self).replace(source, target)
            old, new = os.path.basename(source), os.path.basename(target)
            self.names[new] = self.names.pop(old)
            self._note("replace", self.names[new], old, new)

        return self._do("replace", call)

    def fsync_directory(self, path):
        def call():
            super(Disk, self).fsync_directory(path)
            self._note("fsync_directory")

        return self._do("fsync_directory", call)

    def unlink(self, path):
        def call():
            super(Disk, self).unlink(path)
            self._note("unlink", os.path.basename(path))

        return self._do("unlink", call)

    def listdir(self, path):
        return self._do("listdir", lambda: super(Disk, self).listdir(path))


def contents(directory):
    """The bytes of the files in a directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def after_power_loss(before, log, exhaustive=2**12, samples=5000):
    """What may be in a directory when the power fails after these calls.

    Every write and every change of a name may be lost, unless an fsync of the file or
    of the directory came after it; in any combination.

    Args:
        before: What was there, by name.
        log: Of a `Disk`.
        exhaustive: Up to so many combinations, all of them.
        samples: Of more, so many.
    """
    unsure = []
    for index, (name, *about) in enumerate(log):
        if name == "fsync":
            unsure = [i for i in unsure if log[i][:2] != ("write", about[0])]
        elif name == "fsync_directory":
            unsure = [i for i in unsure if log[i][0] == "write"]
        else:
            unsure.append(index)
    if 2 ** len(unsure) <= exhaustive:
        choices = itertools.product([False, True], repeat=len(unsure))
    else:
        rng = random.Random(len(log))
        choices = ([rng.random() < 0.5 for _ in unsure] for _ in range(samples))
    for lost in choices:
        gone = {index for index, each in zip(unsure, lost, strict=True) if each}
        kept = [each for index, each in enumerate(log) if index not in gone]
        yield _replayed(before, kept)


def _replayed(before, log):
    data = {name: bytearray(each) for name, each in before.items()}
    names = {name: name for name in before}
    for name, *about in log:
        if name == "write":
            number, offset, written = about
            file = data.setdefault(number, bytearray())
            file.extend(bytes(max(0, offset + len(written) - len(file))))
            file[offset : offset + len(written)] = written
        elif name == "create":
            number, new = about
            names[new] = number
        elif name == "replace":
            number, old, new = about
            names.pop(old, None)
            names[new] = number
        elif name == "unlink":
            names.pop(about[0], None)
    return {name: bytes(data.get(number, b"")) for name, number in names.items()}
