"""The replayed step of `bench.planning`, with the costs of a curve's first point. Local."""

import json
import logging
from pathlib import Path

from nodepint_mpi.bench.planning.clocks import WAIT
from nodepint_mpi.bench.planning.costs import read_costs
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.recording import StepRecorder
from nodepint_mpi.bench.planning.replay import Costs, simulate_step
from nodepint_mpi.bench.studies.measures import (
    Curve,
    Model,
    Predicted,
    Row,
    samples_of_a_line,
    seconds,
)
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.core.scopes import MESSAGES
from nodepint_mpi.errors import NodepintError
from nodepint_mpi.io.directory import CONFIG, PHASES

_log = logging.getLogger(__name__)


def make_model(curve: Curve, network: Network | None = None) -> Model | None:
    """What a step should take by the costs of the curve's first point. Local; opens the data.

    Args:
        curve: Its points.
        network: What messages cost; None for what they cost in the largest run that was timed.

    Returns:
        None where that cannot be said; why is logged, unless no step was timed and profiled.
    """
    first = curve.first
    if first is None or first["phases_s"] is None:
        return None
    try:
        return _model(first, network or measured_network(curve))
    except NodepintError as error:
        _log.warning("%s: no model: %s", first["point"], error)
        return None


def measured_network(curve: Curve) -> Network:
    """A message's cost in the largest run that was timed, whatever its size. Local.

    The messages of a curve are alike. Where none were sent they are taken to cost nothing.
    """
    found = 0.0
    for row in curve.rows:
        if seconds(row) is None or row["phases_s"] is None:
            continue
        if count := row["profiled"]["counts"]["messages"]["mean"]:
            found = sum(row["phases_s"][name]["mean"] for name in MESSAGES) / count
    return Network(found, float("inf"))


def _model(first: Row, network: Network) -> Model:
    run = Path(first["run"])
    recorder = StepRecorder.of(read_config(run / CONFIG))
    times = json.loads((run / PHASES).read_text(encoding="utf-8"))
    spent = {name: phase["ranks"] for name, phase in times["phases_s"].items()}
    counted, layout = first["profiled"]["sweeps"], _layout(first)
    line = recorder.line(layout)
    costs = read_costs(spent, line, recorder.sweeps(counted), recorder.coarse_in_fine())

    def model(row: Row) -> Predicted:
        share = samples_of_a_line(row) / samples_of_a_line(first)
        shared = Costs(*(cost * share for cost in costs))
        shared = shared._replace(
            other_s=costs.other_s, update_s=costs.update_s, factor_s=costs.factor_s
        )
        n_samples = max(1, round(share * recorder.n_samples(layout)))
        there = recorder.with_slices(row["n_slices"])
        simulated = simulate_step(
            there.line(_layout(row), n_samples), shared, there.sweeps(counted), network
        )
        shares = {"idle" if part == WAIT else part: s for part, s in simulated.shares.items()}
        return Predicted(simulated.step_s, shares)

    return model


def _layout(row: Row) -> Layout:
    n_data, n_basis = row["data_ranks"], row["basis_ranks"]
    return Layout(row["n_ranks"] // (n_data * n_basis), n_data, n_basis)
