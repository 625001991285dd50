"""Losses by the names that a config has for them, and what is reported beside each."""

from nodepint_mpi.core.flow_matching import denoising_score_matching, flow_matching
from nodepint_mpi.core.objective import (
    Loss,
    SimulationFree,
    accuracy,
    cross_entropy,
    mean_squared_error,
    mean_squared_log_error,
    relative_error,
)
from nodepint_mpi.core.path_losses import (
    energy_score,
    euler_likelihood,
    moment_error,
    relative_error_of_mean,
)

LOSSES: dict[str, Loss | SimulationFree] = {
    "cross_entropy": cross_entropy,
    "mean_squared_error": mean_squared_error,
    "mean_squared_log_error": mean_squared_log_error,
    "energy_score": energy_score,
    "moment_error": moment_error,
    "flow_matching": SimulationFree(flow_matching),
    "denoising_score_matching": SimulationFree(denoising_score_matching),
    "euler_likelihood": SimulationFree(euler_likelihood),
}

METRICS: dict[str, dict[str, Loss]] = {
    "cross_entropy": {"accuracy": accuracy},
    "mean_squared_error": {"relative_error": relative_error},
    "mean_squared_log_error": {
        "mean_squared_error": mean_squared_error,
        "relative_error": relative_error,
    },
    "energy_score": {"relative_error_of_mean": relative_error_of_mean},
    "moment_error": {"relative_error_of_mean": relative_error_of_mean},
    "flow_matching": {},
    "denoising_score_matching": {},
    "euler_likelihood": {},
}
