"""A peer to compare with where it is installed: torchdiffeq, differentiating its own RK4 steps.

Network, data, loss and optimizer are the same; only the gradient comes from the peer.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.network import DenseNetwork

if TYPE_CHECKING:
    from nodepint_mpi.training.error_control import Taken
    from nodepint_mpi.training.setup import Batch, Experiment
    from nodepint_mpi.training.train_state import TrainState


def can_torchdiffeq(config: Config) -> bool:
    """Whether torchdiffeq is installed, and the config is one that it can be asked to train. Local.

    It is for trajectories, a perceptron on the observed state, mean squared errors, and equal
    slices with RK4 steps of one size, several to each time between observations.
    """
    network, time = config.network, config.time
    return (
        all(map(importlib.util.find_spec, ("torch", "torchdiffeq")))
        and isinstance(network, DenseNetwork)
        and network.latent is None
        and not network.time_dependent
        and network.activation == "tanh"
        and config.data is not None
        and config.data.times is not None
        and config.loss is not None
        and config.loss.name == "mean_squared_error"
        and (time.fine.solver, time.edges, time.relaxation) == ("rk4", None, None)
        and time.fine.n_steps is not None
    )


class Torch:
    """Steps whose gradient is torchdiffeq's, taken as those of `training.plain`."""

    def __init__(self, experiment: "Experiment"):
        import jax
        import optax

        self._torch = torch = importlib.import_module("torch")
        self._odeint = importlib.import_module("torchdiffeq").odeint
        config, optimizer = experiment.config, experiment.update.optimizer
        assert config.time.fine.n_steps is not None  # `can_torchdiffeq` has looked
        left, right = config.time.horizon
        self._step_size = (right - left) / (config.time.n_slices * config.time.fine.n_steps)
        self._dtype = getattr(torch, config.run.precision)
        times = np.asarray(experiment.train.times)
        self._seen = times > left + 1e-9 * (right - left)  # the very first is the input
        self._times = torch.tensor([left, *times[self._seen]], dtype=self._dtype)
        self._positive = isinstance(config.network, DenseNetwork) and config.network.positive

        def update(params, opt_state, gradient):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self._update = jax.jit(update)

    def take(self, state: "TrainState", batch: "Batch", step: int) -> "Taken":
        """Take one step. Local."""
        import jax
        import optax

        from nodepint_mpi.parallel.counters import Tally
        from nodepint_mpi.training.error_control import Taken
        from nodepint_mpi.training.plain import plain_report
        from nodepint_mpi.training.train_state import TrainState

        del step
        leaves, tree = jax.tree.flatten(state.params)
        tensors = [
            self._torch.tensor(np.asarray(leaf), dtype=self._dtype, requires_grad=True)
            for leaf in leaves
        ]
        mlp = jax.tree.unflatten(tree, tensors).processor.mlp
        loss = self._loss(mlp, batch.data.initial, batch.data.targets)
        loss.backward()
        gradient = jax.tree.unflatten(tree, [np.asarray(tensor.grad) for tensor in tensors])
        updated = self._update(state.params, state.opt_state, gradient)
        report = plain_report(float(loss.detach()), optax.tree.norm(gradient))
        return Taken(TrainState(*updated), report, gradient, Tally(), serial=True)

    def _loss(self, mlp: Any, inputs: np.ndarray, targets: np.ndarray) -> Any:
        """Mean squared error over what is observed after the start."""
        torch, linear = self._torch, self._torch.nn.functional.linear
        *hidden, last = mlp.layers

        def field(t: Any, u: Any) -> Any:
            del t
            for layer in hidden:
                u = torch.tanh(linear(u, layer.weight, layer.bias))
            return linear(u, last.weight, last.bias)

        start, wanted = (torch.tensor(np.asarray(x), dtype=self._dtype) for x in (inputs, targets))
        start = torch.log(start) if self._positive else start
        states = self._odeint(
            field, start, self._times, method="rk4", options={"step_size": self._step_size}
        )
        predictions = torch.exp(states) if self._positive else states
        return torch.mean((predictions[1:] - wanted.transpose(0, 1)[self._seen]) ** 2)
