"""How a command starts the runs of a series, and keeps others from its folder.

Importing this module loads neither MPI nor JAX.
"""

import contextlib
import errno
import fcntl
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.ranks.child import Ended, cores_for, find_mpirun, run_child

RANKS, CORES = "{ranks}", "{cores}"
_CROWDED = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
"""More ranks than cores, which MPICH starts without being told."""
_NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP


class Launch(NamedTuple):
    """How ranks are started: by words of the user's own with `RANKS` in them, or here by mpirun.

    Started here each rank has cores of its own, as long as there are enough; elsewhere that is the
    launcher's business. `cores` are those of this machine that may be used.
    """

    words: tuple[str, ...]
    cores: tuple[int, ...]

    def run(
        self, words: Sequence[str], *, n_ranks: int, n_cores: int, timeout_s: float, held: int
    ) -> Ended:
        """Start `nodepint` on so many ranks of so many cores each, to its end. Local.

        Args:
            words: What follows `nodepint`.
            n_ranks: Ranks.
            n_cores: Cores of each.
            timeout_s: How long it may take.
            held: The open file of `sole_use`.
        """
        command = [sys.executable, "-m", "nodepint_mpi", *words]
        settings = {"OMP_NUM_THREADS": str(n_cores), "OPENBLAS_NUM_THREADS": str(n_cores)}
        cores = None
        if self.words:
            numbers = {RANKS: str(n_ranks), CORES: str(n_cores)}
            command = [*(_fill(word, numbers) for word in self.words), *command]
        else:
            cores = self.cores[: n_ranks * n_cores]  # ranks divide them among themselves
            if n_ranks > 1:
                command = [find_mpirun(), "-n", str(n_ranks), *command]
                settings["OMPI_MCA_hwloc_base_binding_policy"] = "none"
            if n_ranks * n_cores > len(cores):
                settings |= _CROWDED
        return run_child(command, timeout_s, settings=settings, cores=cores, held=[held])


def make_launch(
    template: str | None, *, n_ranks: int, n_cores: int, crowded: bool = False
) -> Launch:
    """How runs are started. Local.

    Args:
        template: The user's launcher, such as `srun -n {ranks} -c {cores}`; None for mpirun here.
        n_ranks: The most ranks of a run.
        n_cores: The most cores of a rank.
        crowded: Whether ranks may share cores here.

    Raises:
        ConfigError: if that cannot be.
    """
    if template is None:
        if n_ranks > 1:
            find_mpirun()
        return Launch((), tuple(cores_for(1 if crowded else n_ranks)))
    words = tuple(shlex.split(template))
    if not words or RANKS not in template or (n_cores > 1 and CORES not in template):
        raise ConfigError(
            f"`--launcher '{template}'` must say where the numbers of ranks and of cores for each "
            f"go: 'srun -n {RANKS} -c {CORES}'."
        )
    if shutil.which(words[0]) is None:
        raise ConfigError(f"`--launcher '{template}'`: there is no {words[0]} on the PATH.")
    return Launch(words, tuple(cores_for(1)))


@contextlib.contextmanager
def sole_use(out: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[int]:
    """Keep others from the same work in the same folder; who has the open file keeps on.

    Where files cannot be locked, as on some parallel file systems, nobody is kept from anything.

    Args:
        out: The folder, which is made.
        name: Names the work: a file in the folder.
        wait: Whether to wait for others.

    Raises:
        OutputError: if somebody works there, if only a job that an earlier command has left.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / name).open("a")
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OutputError(
                    f"Somebody is writing in {out}, perhaps a job that an earlier command has "
                    "left: wait for its end."
                ) from error
        yield file.fileno()


def _fill(word: str, numbers: dict[str, str]) -> str:
    for place, number in numbers.items():
        word = word.replace(place, number)
    return word
