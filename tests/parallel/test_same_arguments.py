"""Arguments that differ between ranks are found before anything is computed, on all ranks alike."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import AgreementError
from nodepint_mpi.parallel.fingerprint import fingerprint

EDGES = np.linspace(0.0, 1.0, 5)
STEPS = nm.FixedSteps(nm.RK4(), 2)


def decay(t, u, args):
    return -u


def solve(comm, field=decay, u0=(1.0,), edges=EDGES, **options):
    return nm.solve(
        field, u0, edges, comm=comm, **(dict(fine=STEPS, coarse=STEPS, args=(1.0,)) | options)
    )


def written(source, **given):
    """A field from its source text, as if from a file that may differ between machines."""
    module = types.ModuleType("written")
    vars(module).update(given)
    exec(compile(source, "written.py", "exec"), vars(module))
    return module.f


class Rate:
    """A field with a state of its own."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, t, u, args):
        return -self.rate * u


PLAIN = "def f(t, u, args):\n    return -{} * u"
CALLS = "def g(u):\n    return -{} * u\ndef f(t, u, args):\n    return g(u)"


@pytest.mark.mpi(2, 3)
def test_every_kind_of_difference_is_an_error_that_names_it(comms):
    """On the last rank alone; each is looked for in the same process, nothing is compiled."""
    odd = comms.time.rank == comms.time.size - 1
    k = 1 + odd  # what this rank holds
    differences = {
        "args": dict(args=1.0 * k),
        r"args\['rate'\]\[0\]": dict(args={"a": "text", "rate": [np.full(3, k)]}),
        r"args\[1\]": dict(args=(jnp.ones(2), "text" * k)),
        "u0": dict(u0=jnp.full(2, 1.0 * k)),
        r"u0\['x'\]": dict(u0={"x": np.ones(k)}),
        "edges": dict(edges=EDGES * k),
        "guess": dict(guess=np.full((5, 1), 1.0 * k)),
        "method": dict(method=["picard", "serial"][odd]),
        "fine": dict(fine=nm.FixedSteps(nm.RK4(), k)),
        "stopping": dict(stopping=nm.JumpTolerance(10.0**-k)),
        "trust": dict(trust=0.5 * k),
        "field": dict(field=written(PLAIN.format(1.0 * k))),
    }
    for name, given in differences.items():
        with pytest.raises(AgreementError, match=rf"`{name}` on rank {comms.time.size - 1} "):
            solve(comms.time, **given)
    with pytest.raises(AgreementError, match=r"\(2\.0 there, 1\.0 on rank 0\)"):
        jax.grad(lambda a: solve(comms.time, args=a).interface[-1, 0])(1.0 * k)
    # The communicator is as good as before, and equal arguments pass.
    assert solve(comms.time).status is nm.Status.CONVERGED


@pytest.mark.mpi(2, 3)
def test_the_comparison_can_be_turned_off_and_leaves_traces_alone(comms):
    """Inside jit nothing is compared: a rank that has compiled already would not take part."""
    options = dict(trust=0.5 * (1 + comms.time.rank))  # parareal does not read it
    solution = solve(comms.time, check_ranks=False, **options)
    traced = jax.jit(lambda u0: solve(comms.time, u0=u0, **options).interface)(jnp.ones(1))
    np.testing.assert_allclose(traced, solution.interface, rtol=0, atol=1e-14)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "one, other",
    [
        (written(PLAIN.format(1.0)), written(PLAIN.format(2.0))),
        (written(PLAIN.format(1)), written(PLAIN.format(1.0))),
        (written(CALLS.format(1.0)), written(CALLS.format(2.0))),
        (written(PLAIN.format("K"), K=1.0), written(PLAIN.format("K"), K=2.0)),
        (written(PLAIN.format("m.K"), m=types.SimpleNamespace(K=1)), written(PLAIN.format("m.K"))),
        (jax.jit(written(PLAIN.format(1.0))), jax.jit(written(PLAIN.format(2.0)))),
        (functools.partial(decay, args=1.0), functools.partial(decay, args=2.0)),
        (Rate(1.0), Rate(2.0)),
        (Rate(np.ones(3)).__call__, Rate(np.zeros(3)).__call__),
        ((lambda k: lambda t, u, args: k * u)(1.0), (lambda k: lambda t, u, args: k * u)(2.0)),
        (lambda t, u, args, k=1.0: u, lambda t, u, args, k=2.0: u),
        (True, 1),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        (np.ones(2, np.float32), np.ones(2)),
        (jax.random.key(1), jax.random.key(2)),
        (np.zeros((1, 2)), np.zeros((2, 1))),
    ],
)
def test_digests_differ_where_the_values_do(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.mpi(max_size=1)
def test_equal_values_have_equal_digests_wherever_they_are_made():
    def made():
        loop: list = [1.0]
        loop.append(loop)  # contains itself
        return [
            written(CALLS.format(1.0)), Rate(np.ones(3)), loop, {"b": {3, 1, "x"}, "a": 2},
            jnp.ones(2), STEPS, (lambda k: lambda t, u, args: jnp.sin(k * u))(2.0), np.float32,
            nm.SharedBasis("pod", rank=1), {"a": 2, "b": 1},
        ]  # fmt: skip

    assert fingerprint(made()) == fingerprint(made())
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.mpi(max_size=1)
def test_digests_do_not_depend_on_the_hash_seed(mpirun, tmp_path):
    """Two ranks of one job have different seeds and addresses."""
    script = tmp_path / "digest.py"
    for name in ("field.py", "copied.py"):  # a home directory may be mounted anywhere
        (tmp_path / name).write_text(
            "class Kept:\n    names = ('x',)\n\ndef field(t, u, args):\n    return Kept().names\n"
        )
    script.write_text(
        "from pathlib import Path\n"
        "import jax.numpy as jnp, nodepint_mpi as nm\n"
        "from nodepint_mpi.build.imports import import_file\n"
        "from nodepint_mpi.parallel.fingerprint import fingerprint\n"
        "from nodepint_mpi.parallel.comms import world\n"
        "class Field:\n"
        "    names = {'x', 'y', 'z'}\n"
        "    def __call__(self, t, u, args):\n"
        "        return jnp.sin(u) if 'x' in {'a', 'b', 'c', 'd'} else self.names\n"
        "file = Path(__file__).with_name(['field.py', 'copied.py'][world().Get_rank()])\n"
        "own = import_file(file, 'problem.field')\n"
        "value = [Field(), Field().__call__, lambda u: u in ('p', {'q': 1}), nm.RK4()]\n"
        "value += [own.field, own.Kept()]\n"
        "digests = world().allgather((fingerprint(value), hash('a')))\n"
        "assert digests[0][1] != digests[1][1], 'one seed for all'\n"
        "assert digests[0][0] == digests[1][0], digests\n"
    )
    done = mpirun(2, "python", "-m", "mpi4py", script, env={"PYTHONHASHSEED": "random"})
    assert done.returncode == 0, done.stderr
