"""Train Neural ODEs parallel in time on MPI ranks.

Importing the package loads neither MPI nor JAX; the names below do so when first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "solve": "parallel.ivp",
    "Solution": "parallel.solution",
    "Status": "parallel.solution",
    "SolveCarry": "parallel.tracking",
    "value_and_grad": "parallel.tracking",
    "TimeComm": "parallel.comms",
    "make_time_comm": "parallel.comms",
    "world_time_comm": "parallel.comms",
    "sample": "parallel.generate",
    "log_likelihood": "parallel.likelihood",
    "LogLikelihood": "parallel.likelihood",
    "Drawn": "parallel.generate",
    "Sampling": "parallel.sampling",
    "StraightLine": "core.gaussian_paths",
    "VariancePreserving": "core.gaussian_paths",
    "AdaptiveSteps": "core.propagators",
    "FixedSteps": "core.propagators",
    "Stay": "core.propagators",
    "Propagator": "core.propagators",
    "RK4": "core.runge_kutta",
    "explicit_runge_kutta": "core.runge_kutta",
    "EndUpdate": "core.stopping",
    "FixedSweeps": "core.stopping",
    "FreezeSlices": "core.stopping",
    "JumpTolerance": "core.stopping",
    "EncodeProcessDecode": "models.networks",
    "Mean": "core.objective",
    "SimulationFree": "core.objective",
    "flow_matching": "core.flow_matching",
    "denoising_score_matching": "core.flow_matching",
    "SampleArgs": "core.sample_params",
    "SampleBatch": "core.batch",
    "cross_entropy": "core.objective",
    "mean_squared_error": "core.objective",
    "energy_score": "core.path_losses",
    "moment_error": "core.path_losses",
    "euler_likelihood": "core.path_losses",
    "Noise": "parallel.noise",
    "control": "optimal_control.control",
    "Controlled": "optimal_control.control",
    "ParaOpt": "optimal_control.paraopt_options",
    "ParaOptSolution": "optimal_control.paraopt_options",
    "solve_paraopt": "optimal_control.paraopt",
    "Cost": "core.costs",
    "quadratic_cost": "core.costs",
    "PiecewiseConstant": "core.controls",
    "PiecewiseLinear": "core.controls",
    "NetworkControl": "core.controls",
    "Bounded": "core.controls",
    "roughened": "core.controls",
    "Learning": "optimal_control.learning",
    "trajectory_loss": "optimal_control.learning",
    "path_statistics": "parallel.path_statistics",
    "forecast": "parallel.outlook",
    "Forecast": "parallel.outlook",
    "SharedBasis": "parallel.shared_basis",
    "Parareal": "parallel.methods.parareal",
    "Picard": "parallel.methods.picard",
    "Reduced": "parallel.methods.reduced",
    "Serial": "parallel.methods.serial",
    "Tangent": "parallel.methods.tangent",
    "AbstractMethod": "parallel.methods.base",
    "Carry": "parallel.methods.base",
    "Parts": "parallel.methods.base",
    "ReducedModel": "rom.model",
    "Config": "config.experiment",
    "RunSection": "config.run",
    "DenseNetwork": "config.network",
    "ConvNetwork": "config.network",
    "UserNetwork": "config.network",
    "GrowthSection": "config.network",
    "NoiseSection": "config.noise",
    "LossSection": "config.experiment",
    "LossTerm": "config.experiment",
    "OptimSection": "config.optim",
    "OutputSection": "config.run",
    "DataSection": "config.data",
    "TimeSection": "config.time",
    "PararealSection": "config.time",
    "TangentSection": "config.time",
    "ReducedSection": "config.time",
    "PlainSection": "config.time",
    "StepsSection": "config.time",
    "BasisSection": "config.time",
    "StoppingSection": "config.time",
    "AdjointSection": "config.time",
    "TrackingSection": "config.time",
    "RelaxationSection": "config.time",
    "Objects": "build.objects",
    "Term": "core.objective",
    "Callback": "training.callbacks",
    "Wandb": "training.callbacks",
    "Mlflow": "training.callbacks",
    "train": "api",
    "predict": "api",
    "export_rom": "api",
    "load_model": "build.trained",
    "load_rom": "rom.load",
    "read_history": "io.history",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
