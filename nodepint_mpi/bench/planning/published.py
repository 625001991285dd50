"""Published wall-clock times of parareal on 32 to 512 cores, with the costs their authors state.

References:
    [RN] Gattiglio, Grigoryeva, Tamborrino, "RandNet-Parareal", NeurIPS 2024, arXiv:2411.06225.
    [GP] Pentland, Tamborrino, Sullivan, Buchanan, Appel, "GParareal", Statistics and Computing
    33:20 (2023); the logs of its runs, github.com/kpentland/GParareal.
"""

from typing import NamedTuple


class TimedRun(NamedTuple):
    """One row of a published table: a run with one slice to a core.

    `serial_s` and `coarse_s` are of the fine and the coarse propagator over the whole span, one
    slice after the other; `model_s` is what learned corrections took in all sweeps together, and
    `measured_s` the whole run, both to the minute where the authors give minutes. `speed_up` is
    of times that were not rounded. A time of 0 is below a second; None is not stated.
    """

    source: str
    problem: str
    method: str
    n_slices: int
    n_sweeps: int
    serial_s: float | None
    coarse_s: float | None
    model_s: float | None
    measured_s: float
    speed_up: float | None


def _s(hours: int = 0, minutes: int = 0, *, days: int = 0) -> int:
    return ((days * 24 + hours) * 60 + minutes) * 60


def _rows(
    source: str, problem: str, n_slices: int, serial_s: int | None, *rows: tuple
) -> tuple[TimedRun, ...]:
    """Rows of (method, n_sweeps, coarse_s, model_s, measured_s, speed_up) that share the rest."""
    return tuple(
        TimedRun(source, problem, method, n_slices, n_sweeps, serial_s, *times)
        for method, n_sweeps, *times in rows
    )


_PARAREAL = "parareal"
_NEIGHBORS = "nearest-neighbor GParareal"
_NETWORKS = "RandNet-Parareal"

WITH_COSTS: tuple[TimedRun, ...] = (
    *_rows(
        "[RN] Table 1", "Burgers, d = 128", 128, _s(13, 5),
        (_PARAREAL, 90, 0, 0, _s(8, 54), 1.47),
        (_NEIGHBORS, 14, 0, _s(0, 12), _s(1, 39), 7.90),
        (_NETWORKS, 10, 0, 1, _s(1, 2), 12.61),
    ),
    *_rows(
        "[RN] Table 1", "Burgers, d = 1128", 128, _s(18, 52),
        (_PARAREAL, 91, 0, 0, _s(12, 57), 1.41),
        (_NEIGHBORS, 6, 2, _s(1, 25), _s(2, 17), 8.26),
        (_NETWORKS, 4, 2, 1, _s(0, 38), 29.98),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 722", 64, _s(2, 2),
        (_PARAREAL, 53, 0, 0, _s(1, 40), 1.22),
        (_NEIGHBORS, 16, 0, _s(0, 40), _s(1, 11), 1.72),
        (_NETWORKS, 12, 0, 1, _s(0, 23), 5.36),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 1568", 128, _s(4, 21),
        (_PARAREAL, 93, 0, 0, _s(3, 3), 1.42),
        (_NEIGHBORS, 20, 0, _s(10, 32), _s(11, 12), 0.39),
        (_NETWORKS, 12, 0, 4, _s(0, 25), 10.26),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 3362", 256, _s(10, 58),
        (_PARAREAL, 195, 0, 0, _s(7, 52), 1.40),
        (_NETWORKS, 12, 0, 20, _s(0, 33), 19.87),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 11858", 512, _s(16, days=2),
        (_PARAREAL, 58, 1, 0, _s(6, 59), 9.23),
        (_NETWORKS, 6, 2, _s(0, 1), _s(0, 49), 78.44),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 25538", 512, _s(16, days=7),
        (_PARAREAL, 27, 8, 0, _s(9, 50), 19.25),
        (_NETWORKS, 5, 9, _s(0, 2), _s(1, 57), 97.40),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 53792", 512, _s(7, days=21),
        (_PARAREAL, 19, 36, 0, _s(19, 13), 26.60),
        (_NETWORKS, 4, 42, _s(0, 4), _s(4, 6), 124.87),
    ),
    *_rows(
        "[RN] Table 8", "diffusion-reaction, d = 110450", 512, _s(2, days=56),
        (_PARAREAL, 14, _s(0, 3), 1, _s(14, days=1), 35.84),
        (_NETWORKS, 4, _s(0, 3), _s(0, 7), _s(10, 48), 124.52),
    ),
    *_rows(
        "[RN] Table 2", "shallow water, d = 15453", 235, _s(22, 54),
        (_PARAREAL, 52, None, None, _s(5, 8), 4.47),
        (_NETWORKS, 14, None, None, _s(1, 25), 16.16),
    ),
    *_rows(
        "[RN] Table 2", "shallow water, d = 31104", 235, _s(2, days=3),
        (_PARAREAL, 50, None, None, _s(15, 43), 4.68),
        (_NETWORKS, 13, None, None, _s(4, 9), 17.69),
    ),
    *_rows(
        "[RN] Table 2", "shallow water, d = 60903", 235, _s(15, days=13),
        (_PARAREAL, 14, None, None, _s(19, 30), 16.73),
        (_NETWORKS, 9, None, None, _s(12, 34), 25.92),
    ),
    *_rows(
        "[RN] Table 2", "shallow water, d = 105336", 235, _s(4, days=38),
        (_PARAREAL, 8, None, None, _s(7, days=1), 29.37),
        (_NETWORKS, 6, None, None, _s(23, 34), 38.90),
    ),
)  # fmt: skip
"""The serial time is N times a run's fine phase, averaged over the methods: its authors did not run
it (their scripts, github.com/Parallel-in-Time-Differential-Equations/RandNet-Parareal). So it holds
what ranks wait for the slowest slice, and may be a little slower than one row's own phases."""

ONE_PROBLEM: tuple[TimedRun, ...] = tuple(
    TimedRun("[GP] log", "Hopf", _PARAREAL, n_slices, n_sweeps, None, None, None, measured_s, None)
    for n_slices, n_sweeps, measured_s in (
        (32, 20, 89165.98),
        (64, 31, 67471.71),
        (128, 55, 64744.97),
        (256, 99, 56402.50),
        (512, 151, 44210.60),
    )
)
"""The same fine steps, dealt over more and more slices; next to them the 2048 Euler steps of the
coarse propagator are nothing. So the first run's time tells that of the others."""
