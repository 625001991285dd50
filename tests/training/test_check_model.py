"""The user's parts that do not fit are named at set-up, with what they returned or raised."""

import re

import datasets
import numpy as np
import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import NodepintError, ProblemError
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training import memory
from nodepint_mpi.training import train as training
from nodepint_mpi.training.info import make_plan
from nodepint_mpi.training.runtime_errors import explained
from nodepint_mpi.training.setup import set_up
from tests.training.small_config import MLP, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.mpi(max_size=2)]

OWN = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
from nodepint_mpi import Mean
from nodepint_mpi.models.networks import EncodeProcessDecode, Identity

number, text = 3, "text"

class Field(eqx.Module):
    rate: jax.Array
    of: object = eqx.field(static=True)

    def __call__(self, t, u, args):
        return self.of(self.rate, u)

def field(of):
    return lambda key, **shape: Field(jnp.ones(1), of)

def fails(*arguments, **options):
    raise KeyError("the reason")

def calling(function):
    def call(u):
        shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
        return jax.pure_callback(function, shape, u, vmap_method="sequential")

    differentiable = jax.custom_vjp(call)
    differentiable.defvjp(lambda u: (call(u), None), lambda kept, bar: (bar,))
    return call, differentiable

def mean(sum):  # unchecked, as it is outside of tests
    return eqx.tree_at(lambda made: made.sum, Mean(jnp.array(1.0), jnp.array(1.0)), sum)

def late(u):
    late.calls += 1
    if late.calls > 1:
        raise KeyError("the reason")
    return np.asarray(u)
late.calls = 0

complex_field = field(lambda rate, u: (1 + 1j) * u)
integer_field = field(lambda rate, u: jnp.ones(u.shape, int))
tuple_field = field(lambda rate, u: (u, u))
none_field = field(lambda rate, u: None)
short_field = field(lambda rate, u: u[:1])
number_field = field(lambda rate, u: 1.0)
failing_field = field(fails)
callback_field = field(lambda rate, u: calling(fails)[1](u))
rigid_field = field(lambda rate, u: calling(fails)[0](u))
late_field = field(lambda rate, u: calling(late)[1](u))

def parts(encoder=Identity(), decoder=Identity()):
    made = field(lambda rate, u: -rate * u)(None)
    return lambda key, **shape: EncodeProcessDecode(encoder, made, decoder)

complex_state = parts(encoder=lambda x: x + 0j)
two_states = parts(encoder=lambda x: (x, x))
failing_encoder = parts(encoder=fails)
failing_decoder = parts(decoder=fails)
none_decoded = parts(decoder=lambda u: None)
no_parameters = lambda key, **shape: lambda t, u, args: -u
integer_parameters = lambda key, **shape: Field(jnp.ones(1, int), lambda rate, u: -u)

rigid_loss = lambda p, t: mean(jnp.sum(calling(np.asarray)[0](p)))
plain_loss = lambda p, t: jnp.mean((p - t) ** 2)
vector_loss = lambda p, t: mean(jnp.sum((p - t) ** 2, axis=0))
complex_loss = lambda p, t: mean(jnp.sum(p - t) * 1j)
none_loss = lambda p, t: None
failing_loss = lambda p, t: fails()
shape_loss = lambda p, t: Mean(jnp.sum(p @ jnp.ones((7, 1))), jnp.array(1.0))
"""


@pytest.fixture
def made(source, shared_tmp_path, comms):
    path = shared_tmp_path / "own.py"
    if comms.control.rank == 0:
        path.write_text(OWN)
    comms.control.Barrier()

    def make(key="network.name", value="no", **options):
        text = small_config(source, network="" if "network" in key else MLP, **options)
        value = [f"{path}:{value}"] if key == "loss.metrics" else f"{path}:{value}"
        return parse_config(text, {key: value})

    return make


CASES = [
    ("network.name", "complex_field", "field returned shape (2,) and type complex128 for a"),
    ("network.name", "integer_field", "field returned shape (2,) and type int64 for a state"),
    ("network.name", "tuple_field", "vector field returned a tuple of 2 for a state of shape"),
    ("network.name", "none_field", "The vector field returned None for a state of shape (2,)"),
    ("network.name", "short_field", "field returned shape (1,) and type float64 for a state"),
    ("network.name", "number_field", "The vector field returned a float for a state of shape"),
    ("network.name", "failing_field", "vector field failed for .*KeyError: 'the reason'"),
    ("network.name", "callback_field", "on the first sample failed: KeyError: 'the reason'"),
    ("network.name", "rigid_field", "Differentiating encoder, .* failed for .*Pure callbacks"),
    ("network.name", "complex_state", "The encoder returned shape (2,) and type complex128"),
    ("network.name", "two_states", "The encoder returned a tuple of 2; expected one array"),
    ("network.name", "failing_encoder", "The encoder failed for shape (2,) and type float64"),
    ("network.name", "failing_decoder", "The decoder failed for shape .*KeyError: 'the reason"),
    ("network.name", "none_decoded", "The decoder returned None; expected one array of real"),
    ("network.name", "no_parameters", "The model has no parameters: none of its arrays holds"),
    ("network.name", "integer_parameters", "The model has no parameters"),
    ("network.name", "fails", "was called with a key, .* and failed: KeyError: 'the reason'"),
    ("network.name", "number", "and failed: TypeError: 'int' object is not callable"),
    ("loss.name", "plain_loss", "The loss returned shape () and type float64 for predictions"),
    ("loss.name", "vector_loss", "returned a `Mean` whose `sum` is shape (6, 2) and type"),
    ("loss.name", "complex_loss", "returned a `Mean` whose `sum` is shape () and type complex"),
    ("loss.name", "none_loss", "The loss returned None for predictions of shape (9, 6, 2)"),
    ("loss.name", "failing_loss", "The loss failed for .*: KeyError: 'the reason'"),
    ("loss.name", "shape_loss", "The loss failed for predictions of shape (9, 6, 2) and type"),
    ("loss.name", "rigid_loss", "Differentiating the loss failed for .*Pure callbacks do not"),
    ("loss.name", "text", "is of type str; expected a function"),
    ("loss.metrics", "plain_loss", "The metric 'plain_loss' returned shape () and type float"),
    ("loss.metrics", "number", "is of type int; expected a function"),
    ("time.fine.solver", "number", "is of type int; expected a diffrax solver"),
]


@pytest.mark.mpi(max_size=1)  # every rank says the same, as `together` sees to
def test_a_part_that_does_not_fit_is_named(made, comms):
    for key, value, said in CASES:
        with pytest.raises(NodepintError) as caught:
            set_up(made(key, value), comms)
        message = str(caught.value)
        assert re.search(re.escape(said).replace(r"\.\*", ".*"), message), (value, message)
        assert "\n" not in message and "Traceback" not in message


def test_what_is_no_function_of_the_kind_is_not_called_with_data(source, comms):
    config = parse_config(small_config(source), {"loss.name": "os:system"})
    with pytest.raises(ProblemError, match="The loss failed for predictions .*TypeError: system"):
        set_up(config, comms)


def test_a_callback_that_fails_later_is_one_sentence(made, comms, shared_tmp_path):
    with pytest.raises(ProblemError, match="Compiled code failed: KeyError: 'the reason'"):
        if comms.control.size > 1:  # there the job is ended by the rank that fails
            with explained():
                raise training.jax.errors.JaxRuntimeError(
                    "INTERNAL: callback\nTraceback (most recent call last):\nKeyError: 'the reason'"
                )
        config = made("network.name", "late_field", options='method = "serial"')
        training.train(config, shared_tmp_path / "run", comms, StopFlag())


@pytest.mark.mpi(max_size=1)
def test_what_cannot_fit_is_refused_before_it_is_made(source, comms):
    for keys, what in [
        ({"network.width": 10**8}, "for parameters and gradient"),
        ({"time.coarse.n_steps": 10**12}, "for the times of all steps"),
        ({"time.fine.n_steps": 10**12}, "for states for the gradient"),
        ({"network.depth": 100, "network.width": 10**6}, "for parameters and gradient"),
    ]:
        config = parse_config(small_config(source), keys)
        with pytest.raises(NodepintError, match=rf"at least .* GiB.*{what}.* the machine has"):
            set_up(config, comms)
        if what == "for parameters and gradient":
            with pytest.raises(NodepintError, match="needs at least"):
                make_plan(config, 2)


def test_the_ranks_of_a_machine_share_its_memory(source, comms, monkeypatch):
    config = parse_config(small_config(source))
    needed = sum(memory.plan_parameters(set_up(config, comms).model).values())
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**9)
    memory.require_memory({"x": 10**9 // 2}, 2)
    with pytest.raises(NodepintError, match="953.7 MiB for the 2 ranks") as caught:
        monkeypatch.setattr(memory, "machine_bytes", lambda: 10**9 - 1)
        memory.require_memory({"x": 10**9 // 2}, 2)
    assert "476.8 MiB a rank" in str(caught.value) and needed > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[3].__setitem__(4, 1.9), "observation 5 .* of row 3 is at 1.25, after 1.9"),
        (lambda t: t.__setitem__((slice(None), 8), t[:, 7]), "observation 8 .* is at 1.75, after"),
        (lambda t: t.__imul__(1.5), "from 0 to 3, outside the horizon"),
    ],
)
def test_times_that_do_not_fit_are_named_by_training_and_by_its_plan(
    comms, shared_tmp_path, change, said
):
    if comms.control.rank == 0:
        times = np.tile(np.linspace(0.0, 2.0, 9), (6, 1))
        change(times)
        rows = {"t": times.tolist(), "u": np.ones((6, 9, 2)).tolist()}
        split = datasets.Dataset.from_dict(rows)
        both = datasets.DatasetDict({"train": split, "test": split})
        both.save_to_disk(str(shared_tmp_path / "set"))
    comms.control.Barrier()
    config = parse_config(small_config(shared_tmp_path / "set"))
    for act in (lambda: set_up(config, comms), lambda: make_plan(config, comms.control.size)):
        with pytest.raises(NodepintError, match=said):
            act()


def test_out_of_memory_is_one_sentence():
    for error in (
        training.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        MemoryError(),
    ):
        with pytest.raises(ProblemError, match="^Out of memory: .* `nodepint info` shows"):
            with explained():
                raise error
