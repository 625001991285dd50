"""Run by test_compile_cache.py on 2 ranks: `roles.py FOLDER FIRST SECOND OPERATION`.

FIRST and SECOND, "pair" and "alone" in either order, are the communicators of the two sums of a
program, made in that order. Prints what rank 0 has computed and how many programs were compiled.
"""

import sys

import jax
import jax.numpy as jnp
import mpi4jax
from jax._src import compiler
from mpi4py import MPI

from nodepint_mpi.parallel.comms import alone, world
from nodepint_mpi.ranks.compile_cache import keep_programs

folder, first, second, operation = sys.argv[1:]
keep_programs(folder)
whole, compiled = compiler.backend_compile_and_load, []


def compile_and_count(backend, module, *options):
    compiled.append(str(module))
    return whole(backend, module, *options)


compiler.backend_compile_and_load = compile_and_count
made = {name: {"pair": world, "alone": alone}[name]().Dup() for name in (first, second)}
one, other = made[first], made[second]


@jax.jit
def program(x):
    inner = mpi4jax.allreduce(x, getattr(MPI, operation), comm=one)
    return 10 * inner + mpi4jax.allreduce(x, getattr(MPI, operation), comm=other)


rank = world().Get_rank()
results = world().gather(program(jnp.full(3, rank + 1.0)).tolist())
n_compiled = world().gather(sum("mpi_allreduce" in text for text in compiled))
if results is not None:
    print({"results": [values[0] for values in results], "compiled": n_compiled})
