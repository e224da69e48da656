"""Files that are written whole or not at all, and survive a loss of power."""

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress

# Tells this process from one that had its number before, as in containers.
_TOKEN = secrets.token_hex(4)
_TEMPORARY = re.compile(r"\.tmp-(\d{1,9})-([0-9a-f]{8})-[0-9a-f]{8}")


class Files:
    """The system calls of a save, one method each, so that tests can let them fail."""

    def create(self, path: str) -> int:
        """Makes a new file and opens it for writing; its mode is the umask's choice."""
        binary = getattr(os, "O_BINARY", 0)  # or Windows would change line ends
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | binary, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """Writes some of the data, and returns how many bytes."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Waits until what was written is on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Closes a file."""
        os.close(fd)

    def replace(self, source: str, target: str) -> None:
        """Gives a file another name, in one step, whatever had it before."""
        os.replace(source, target)

    def fsync_directory(self, path: str) -> None:
        """Waits until the names in a directory are on the disk."""
        if os.name != "posix":  # others open no directory
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: str) -> None:
        """Deletes a file."""
        os.unlink(path)

    def listdir(self, path: str) -> list[str]:
        """The names in a directory."""
        return os.listdir(path)


DISK = Files()


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; `errno` says why, `filename` which.

    What was there before is still there, whole. (The new one may be in its place, whole
    too, if all went well but the very last: to make sure of its name on the disk.)
    """

    def __init__(self, path: str, cause: OSError) -> None:
        reason = cause.strerror or str(cause)
        super().__init__(
            cause.errno,
            f"the checkpoint could not be written ({reason}); what was there before "
            f"is intact",
            path,
        )


def write_file(
    path: str, chunks: Iterable[bytes | memoryview], files: Files = DISK
) -> None:
    """Writes a file that is there whole or not at all, also after a loss of power.

    It is written under another name in the same directory, brought to the disk, and
    only then renamed (Pillai et al., All File Systems Are Not Created Equal, 2014). A
    failed fsync is not tried again: the kernel may have dropped what it could not write
    (Rebello et al., Can Applications Recover from fsync Failures?, 2020).

    Args:
        path: Of the file, which is replaced if there is one.
        chunks: What to write, one after the other.
        files: The system calls.

    Raises:
        CheckpointWriteError: If that fails; nothing is left of the attempt.
    """
    directory = os.path.dirname(path) or os.curdir
    name = f".tmp-{os.getpid()}-{_TOKEN}-{secrets.token_hex(4)}"
    temporary = os.path.join(directory, name)
    created, opened = False, -1
    try:
        opened = files.create(temporary)
        created = True
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while rest:
                rest = rest[files.write(opened, rest) :]
        files.fsync(opened)
        closing, opened = opened, -1
        files.close(closing)
        files.replace(temporary, path)
        created = False
        files.fsync_directory(directory)
    except BaseException as error:
        if opened >= 0:
            with suppress(OSError):
                files.close(opened)
        if created:
            with suppress(OSError):
                files.unlink(temporary)
        if isinstance(error, OSError):
            raise CheckpointWriteError(path, error) from error
        raise


def is_left_over(name: str) -> bool:
    """Whether that is a file which `write_file` of a dead process left behind."""
    match = _TEMPORARY.fullmatch(name)
    if match is None or os.name != "posix":
        return False
    process = int(match[1])
    if process == os.getpid():
        return match[2] != _TOKEN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's, and alive
    return False
