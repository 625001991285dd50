"""Brownian paths of training samples: a path belongs to a sample, or to a sample in one step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nodepint_mpi.core.keys import EVALUATION, keys_as_numbers
from nodepint_mpi.core.noise import path_keys
from nodepint_mpi.core.stochastic import OfArgs, StochasticField


@dataclass(frozen=True)
class SampleNoise:
    """The noise of a training run: which paths its samples have, and of which kind they are.

    Args:
        seed: Of all paths.
        kind: "diagonal", "scalar" or "general"; see `nodepint_mpi.Noise`.
        n_dims: Brownian motions of "general" noise.
        n_paths: Paths of each sample, the first axis of whose state counts them; None for one path
            without such an axis.
        fresh: Whether each optimizer step has paths of its own, or all have the same.
        n_fine: Fine steps of a slice.
        levy: Whether a solver reads space-time Levy areas.
    """

    seed: int
    kind: str
    n_dims: int | None
    n_paths: int | None
    fresh: bool
    n_fine: int
    levy: bool

    @property
    def axes(self) -> tuple[int, ...]:
        """What the paths add to the shape of a state."""
        return () if self.n_paths is None else (self.n_paths,)

    def spread(self, states: Array) -> Array:
        """States of samples (samples, *state) as the start of all their paths. Local."""
        if self.n_paths is None:
            return states
        shape = (states.shape[0], self.n_paths, *states.shape[1:])
        return jnp.broadcast_to(states[:, None], shape)

    def keys(
        self, rows: Int[Array, " samples"], step: Int[Array, ""] | None
    ) -> Float[Array, "samples *paths bytes"]:
        """The keys of the paths of these global rows, as numbers. Local.

        Args:
            rows: Global row numbers.
            step: The optimizer step; None outside training, where paths are others than in it.
        """
        number = jnp.asarray(EVALUATION) if step is None else step if self.fresh else None

        keys = path_keys(jax.random.key(self.seed), rows, number)
        if self.n_paths is not None:
            paths = jnp.arange(self.n_paths)
            keys = jax.vmap(lambda key: jax.vmap(lambda m: jax.random.fold_in(key, m))(paths))(keys)
        return keys_as_numbers(keys)

    def field(self, drift: Callable, diffusion: Callable, state: tuple[int, ...]) -> Any:
        """Drift and diffusion of one path, functions of (t, u, args), as one field. Local."""
        shapes = {"diagonal": state, "scalar": ()}
        shape = shapes[self.kind] if self.n_dims is None else (self.n_dims,)
        is_matrix = self.kind == "general"
        return StochasticField(
            OfArgs(drift), OfArgs(diffusion), shape, is_matrix, self.n_fine, self.levy
        )
