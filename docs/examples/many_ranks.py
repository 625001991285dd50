"""Where a step of parareal spends its time on more and more ranks, with stated costs.

A forward solve with one sweep; a slice to a rank. Nothing is measured: the operations of all ranks
are recorded, and replayed on clocks: `python docs/examples/many_ranks.py`, without mpirun.
"""

from nodepint_mpi import Levels
from nodepint_mpi.bench.planning.clocks import Clocks
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.replay import Costs, replay
from nodepint_mpi.bench.planning.stages import Sweeps
from nodepint_mpi.bench.planning.validation import parareal_line

SERIAL_S = 8.0  # the fine solve of the whole horizon on one rank
COARSE_S = 20e-6  # a coarse step, however long: one evaluation of a field
NETWORK = Network(latency_s=2e-6, bandwidth=1e10)


def solve_ms(n_ranks: int, levels: Levels | None) -> float:
    """Milliseconds of the solve."""
    costs = Costs(SERIAL_S / n_ranks, 0.0, 0.0, COARSE_S, 0.0, 0.0, 0.0, 0.0)
    clocks = Clocks(n_ranks, n_ranks, 1, NETWORK)
    replay(clocks, parareal_line(n_ranks, levels), costs, Sweeps(forward=1, back=0))
    return 1e3 * float(clocks.now.max())


table = []
for n_ranks in (2, 16, 64, 512, 4096):
    one, two = solve_ms(n_ranks, None), solve_ms(n_ranks, Levels(number=2))
    table.append((n_ranks, 1e3 * SERIAL_S / n_ranks, one, two))
if __name__ == "__main__":
    print("ranks | fine, ms | one level, ms | two levels, ms | speed-up, two levels")
    for n_ranks, fine, one, two in table:
        print(f"{n_ranks} | {fine:.4g} | {one:.4g} | {two:.4g} | {1e3 * SERIAL_S / two:.0f}")
