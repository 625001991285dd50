"""What `nodepint doctor` runs apart from itself, so that a broken MPI cannot take it down.

python -m nodepint_mpi.doctor.probe facts           one process: prints the stack as JSON
mpirun -n 2 python -m nodepint_mpi.doctor.probe ranks FOLDER TIMEOUT_S
                                                 a job: prints what the ranks found as JSON
"""

import faulthandler
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nodepint_mpi.ranks.libmpi import loaded_libmpi

if TYPE_CHECKING:
    from mpi4py import MPI


def _error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _library() -> str:
    """Name and version of the MPI library, without its build details."""
    from mpi4py import MPI

    first_line = MPI.Get_library_version().splitlines()[0]
    return " ".join(first_line.partition(",")[0].split())


def _mpi4py_facts() -> dict[str, Any]:
    from mpi4py import MPI

    return {
        "library": _library(),
        "standard": ".".join(map(str, MPI.Get_version())),
    }


def _jax_facts() -> dict[str, Any]:
    import jax

    with jax.enable_x64(True):
        x = jax.jit(lambda x: (1.0 + x) - 1.0)(jax.numpy.asarray(1e-12))
        float64 = x.dtype == "float64" and abs(float(x) - 1e-12) < 1e-15
    return {
        "backend": jax.default_backend(),
        "devices": [str(device) for device in jax.local_devices()],
        "float64": bool(float64),
    }


def _mpi4jax_facts() -> dict[str, Any]:
    import mpi4jax

    return {"cuda": bool(mpi4jax.has_cuda_support())}


def _h5py_facts() -> dict[str, Any]:
    import h5py

    return {"mpi": bool(h5py.get_config().mpi), "hdf5": h5py.version.hdf5_version}


def facts() -> dict[str, dict[str, Any]]:
    """What each part of the stack says of itself, or its `error`. Local.

    `libmpi` of a part is what is loaded after importing it, in this order, so the part that
    brings a second MPI library can be named.
    """
    parts = {
        "mpi4py": _mpi4py_facts,
        "mpi4jax": _mpi4jax_facts,
        "h5py": _h5py_facts,
        "jax": _jax_facts,
    }
    result: dict[str, dict[str, Any]] = {}
    for name, ask in parts.items():
        try:
            result[name] = ask()
        except Exception as error:  # whatever a broken installation throws: it is the finding
            result[name] = {"error": _error(error)}
        result[name]["libmpi"] = loaded_libmpi()
    return result


def _sum_over_ranks(comm: "MPI.Intracomm") -> str | None:
    import jax
    import mpi4jax
    import numpy as np
    from mpi4py import MPI

    def total(x: jax.Array) -> jax.Array:
        return mpi4jax.allreduce(x, op=MPI.SUM, comm=comm)

    with jax.enable_x64(True):
        found = np.asarray(jax.jit(total)(jax.numpy.full(3, comm.Get_rank() + 1.0)))
    size = comm.Get_size()
    expected = size * (size + 1) / 2
    if not np.array_equal(found, np.full(3, expected)):
        return f"allreduce inside jit gave {found.tolist()}, expected three times {expected}"
    return None


def _share_a_file(comm: "MPI.Intracomm", path: str) -> str | None:
    import h5py
    import numpy as np

    rank, size = comm.Get_rank(), comm.Get_size()
    with h5py.File(path, "w", driver="mpio", comm=comm) as file:
        rows = file.create_dataset("rows", (size, 4), dtype="f8")
        with rows.collective:
            rows[rank] = rank + np.arange(4) / 10
    with h5py.File(path, "r", driver="mpio", comm=comm) as file:
        rows = file["rows"]
        with rows.collective:
            found = rows[:]
    if not np.array_equal(found, np.arange(size)[:, None] + np.arange(4) / 10):
        return f"the file {path} does not hold what the ranks wrote"
    return None


def check_ranks(comm: "MPI.Intracomm", folder: str | None, timeout_s: float) -> dict[str, Any]:
    """Reduce inside jit, and write and read one file together. Collective over `comm`.

    Args:
        comm: The ranks to check; it is duplicated.
        folder: Where rank 0 puts the file, a folder that all ranks see; read on rank 0 only.
        timeout_s: After this time a rank prints its stack and ends, and so does the job.

    Returns:
        `size`, `hosts` (number of machines), `libraries` (MPI versions) and `problems`, equal on
        all ranks.
    """
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=2)
    try:
        inside_jit, control = comm.Dup(), comm.Dup()
        rank = comm.Get_rank()
        mine = os.path.join(folder or ".", f".nodepint-doctor-{os.getpid()}.h5")
        path = cast(str, control.bcast(mine))
        problems = []
        for name, check in (
            ("allreduce inside jit", lambda: _sum_over_ranks(inside_jit)),
            ("one file for all ranks", lambda: _share_a_file(control, path)),
        ):
            try:
                problem = check()
            except Exception as error:  # told to all; who waits for this rank is ended by the clock
                problem = f"{name}: {_error(error)}"
            found = control.allgather(problem)
            problems += [f"rank {r}: {p}" for r, p in enumerate(found) if p is not None]
        if rank == 0:
            Path(path).unlink(missing_ok=True)
        result = {
            "size": comm.Get_size(),
            "hosts": len(set(control.allgather(platform.node()))),
            "libraries": sorted(set(control.allgather(_library()))),
            "problems": problems,
        }
        inside_jit.Free()
        control.Free()
        return result
    finally:
        faulthandler.cancel_dump_traceback_later()


def main(arguments: list[str]) -> None:
    """Print one of the two findings as the last line of standard output."""
    if arguments[0] == "facts":
        print(json.dumps(facts()))
        return
    from nodepint_mpi.parallel.comms import world
    from nodepint_mpi.ranks.devices import settle

    comm = world()
    settle(comm, share_gpus=True)  # both ranks would start on the first GPU
    result = check_ranks(comm, arguments[1], float(arguments[2]))
    if comm.Get_rank() == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
