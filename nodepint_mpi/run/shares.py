"""Where a training step's time goes: messages and waiting, coarse steps, the rest."""

import contextlib
import ctypes
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.networks import as_numbers
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.sweeps import slice_times
from nodepint_mpi.parallel.comms import alone, make_time_comm
from nodepint_mpi.parallel.methods import Line, Parareal
from nodepint_mpi.run.setup import Experiment, make_problem
from nodepint_mpi.run.step import split_model

REPEATS = 20

_DONE = re.compile(r"done with code 0 \(([0-9.e+-]+)s\)")


class MessageTimes:
    """Adds up the seconds that jitted code spends in MPI calls: mostly waiting for other ranks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Count what runs in the body of a `with` statement; its output is kept back. Local.

        Needs MPI4JAX_DEBUG=1 since before mpi4jax was imported, so that it prints how long every
        message took. Block until all is computed before leaving.
        """
        with tempfile.TemporaryFile() as log:
            _flush()
            kept = [os.dup(number) for number in (1, 2)]
            try:
                for number in (1, 2):
                    os.dup2(log.fileno(), number)
                yield
            finally:
                _flush()
                for number, copy in zip((1, 2), kept, strict=True):
                    os.dup2(copy, number)
                    os.close(copy)
                log.seek(0)
                text = log.read().decode(errors="replace")
                self.seconds += sum(map(float, _DONE.findall(text)))


def _flush() -> None:
    """Of C's own buffers, which mpi4jax prints into."""
    ctypes.CDLL(None).fflush(None)


def time_coarse(experiment: Experiment, inputs: np.ndarray) -> float | None:
    """Seconds that a tracked step's coarse work takes, one slice after the other as it has to be.

    Local: all slices, forward and back, on this rank alone, with the network as it was made; the
    median of several runs. None for methods without a coarse chain.
    """
    method = experiment.method
    if not isinstance(method, Parareal):
        return None
    comm = make_time_comm(alone())
    problem = make_problem(experiment.config, comm, experiment.model, experiment.train)
    owned = problem.observations.owned

    @jax.jit
    def there_and_back(params, initial):
        line = Line(comm, owned, params.processor)
        starts = method.resume(line, initial, None, None).states.starts
        *_, ts = slice_times(owned, starts)
        sources = SliceResult(
            jnp.zeros((*ts.shape, *initial.shape), initial.dtype), jnp.ones_like(starts)
        )
        return method.resume_cotangents(line, None, starts, sources, None).lefts[0]

    params, _ = split_model(experiment.model)
    initial = jax.vmap(experiment.model.encoder)(as_numbers(jnp.asarray(inputs)))
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        there_and_back(params, initial).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
