"""One writer for a folder: a lock that goes with the process that holds it.

It is a POSIX record lock (fcntl) on a file in the folder. The system releases it however the
process ends, so a killed job leaves none behind. Shared file systems honor it between nodes where
they run a lock manager: NFS from version 4, NFS 3 with lockd, Lustre mounted with `flock` (not
with `localflock`, which sees one node only), GPFS, BeeGFS with its locks switched on. The text in
the file says who holds it; it is for people, and a stale text locks nobody out.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io.errno_text import error_text

LOCK = "lock"

_log = logging.getLogger(__name__)
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locking(folder: Path) -> Iterator[None]:
    """Be the one who writes in an existing folder. Local; one rank of a job holds the lock.

    Where the file system has no locks, this is said in a warning, and nothing is held.

    Raises:
        OutputError: if another process holds it, with host, process and job; or if the lock file
            cannot be written.
    """
    path = folder / LOCK
    try:
        # Not followed: a link would make this file's text appear somewhere else.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise OutputError(
                    f"{folder} is being written by another process ({_holder(handle)}): expected "
                    "one writer. Wait for it or stop it, then try again; a job that has ended "
                    "holds no lock."
                ) from None
            if error.errno not in _NO_LOCKS:
                raise OutputError(f"cannot lock {path}: {error_text(error)}") from error
            _log.warning(
                "%s: this file system does not support locks (%s); start only one job",
                path,
                error_text(error),
            )
        _write_holder(path, handle)
        yield
    finally:
        os.close(handle)  # releases it


def _write_holder(path: Path, handle: int) -> None:
    job = os.environ.get("SLURM_JOB_ID", "none")
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    text = f"host {socket.gethostname()}, process {os.getpid()}, job {job}, since {since}\n"
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error


def _holder(handle: int) -> str:
    text = os.pread(handle, 300, 0).decode("utf-8", "replace").strip()
    return "".join(c for c in text if c.isprintable()) or "of unknown name"
