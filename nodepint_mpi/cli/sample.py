"""`nodepint sample`: samples of a trained velocity field."""

from pathlib import Path
from typing import Any

import click

from nodepint_mpi.cli.common import (
    checkpoint_option,
    finish,
    json_option,
    parse_network,
    parse_ranks,
    say,
    start_run,
    trust_option,
)

_METHODS = ("serial", "parareal", "picard", "tangent")


def _parse_classes(context: Any, option: Any, text: str | None) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    if text is None:
        return ()
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"expected comma-separated integers such as 0,1,2, got '{text}'"
        ) from None


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--n", "n_samples", default=64, show_default=True, type=click.IntRange(1))
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(_METHODS),
    help="May be repeated [tangent].",
)  # fmt: skip
@click.option(
    "--sampler", default="ode", show_default=True, type=click.Choice(["ode", "sde"]),
    help="The probability-flow equation, or the stochastic one.",
)  # fmt: skip
@click.option(
    "--steps", "n_steps", default=256, show_default=True, type=click.IntRange(1),
    help="Steps from noise to data.",
)  # fmt: skip
@click.option(
    "--solver", default="euler", show_default=True,
    type=click.Choice(["euler", "heun", "midpoint"]), help="Of each step.",
)  # fmt: skip
@click.option(
    "--slices", "n_slices", type=click.IntRange(1),
    help="Slices solved at once [about the root of the steps; for picard all steps].",
)  # fmt: skip
@click.option("--classes", callback=_parse_classes, metavar="N,...", help="In turn [all].")
@click.option(
    "--guidance", default=1.0, show_default=True, type=click.FloatRange(0),
    help="Away from no class towards the class asked for; 1 is as trained. For fields that were "
    "also trained without a class, which is the number -1.",
)  # fmt: skip
@click.option(
    "--rank", type=click.IntRange(1), help="tangent: directions of the shared basis [all]."
)
@click.option(
    "--new", "n_new", type=click.IntRange(1),
    help="tangent with a rank: new directions a sweep [a third of it].",
)  # fmt: skip
@click.option(
    "--complement/--no-complement", default=True,
    help="tangent with a rank: coarse steps for what lies outside (the default).",
)  # fmt: skip
@click.option(
    "--coarse-steps", default=1, show_default=True, type=click.IntRange(1), help="In a slice."
)
@click.option(
    "--tangent-steps", type=click.IntRange(1),
    help="tangent: steps in a slice of which derivatives are taken [all].",
)  # fmt: skip
@click.option(
    "--tol", type=click.FloatRange(0, min_open=True),
    help="Where to stop [parareal 1e-3, picard 1e-2, tangent 1e-6].",
)  # fmt: skip
@click.option("--max-sweeps", type=click.IntRange(1), help="The most sweeps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--compare", is_flag=True, help="Also sample serially; print the difference.")
@click.option(
    "--plan", "plan_ranks", default="", callback=parse_ranks, metavar="N,...",
    help="With --compare on one rank: forecast the time on these numbers of ranks.",
)  # fmt: skip
@click.option(
    "--network", default="2e-6,1e10", show_default=True, callback=parse_network,
    metavar="SECONDS,BYTES/S", help="Latency and bandwidth that --plan assumes.",
)  # fmt: skip
@checkpoint_option
@trust_option
@json_option
def sample(
    run_dir: Path,
    n_samples: int,
    methods: tuple[str, ...],
    sampler: str,
    n_steps: int,
    solver: str,
    n_slices: int | None,
    classes: tuple[int, ...],
    guidance: float,
    rank: int | None,
    n_new: int | None,
    complement: bool,
    coarse_steps: int,
    tangent_steps: int | None,
    tol: float | None,
    max_sweeps: int | None,
    seed: int,
    compare: bool,
    plan_ranks: tuple[int, ...],
    network: tuple[float, float],
    checkpoint: str | None,
    trust: bool,
    json_file: Path | None,
) -> None:
    """Draw samples of the velocity field of RUN_DIR, parallel in time.

    Writes RUN_DIR/samples/NAME.npz and pictures/samples.png. With several methods and `--compare`
    it measures them side by side.
    """
    from nodepint_mpi.io.directory import read_run

    comms, _ = start_run(lambda: read_run(run_dir))
    import diffrax

    from nodepint_mpi.errors import ConfigError
    from nodepint_mpi.parallel.sampling import Sampling
    from nodepint_mpi.training.generate import Wanted, format_samples, sample_run

    methods = methods or ("tangent",)
    if plan_ranks and (not compare or comms.control.size > 1):
        raise ConfigError(
            "`--plan` takes the costs of one rank: leave mpirun out, and give `--compare`."
        )
    if rank is not None and "tangent" not in methods:
        raise ConfigError("`--rank` belongs to `--method tangent`.")
    solvers = {"euler": diffrax.Euler, "heun": diffrax.Heun, "midpoint": diffrax.Midpoint}
    options = [
        Sampling(
            sampler=sampler, method=method, n_steps=n_steps, solver=solvers[solver](),
            n_slices=None if method == "picard" and len(methods) > 1 else n_slices,
            coarse_steps=coarse_steps, complement=complement, tol=tol, max_sweeps=max_sweeps,
            seed=seed, rank=rank if method == "tangent" else None,
            n_new=n_new if method == "tangent" else None,
            tangent_steps=tangent_steps if method == "tangent" else None,
        )
        for method in methods
    ]  # fmt: skip
    rows = sample_run(
        run_dir, comms, Wanted(n_samples, classes, compare, guidance), options,
        checkpoint=checkpoint, trust=trust,
    )  # fmt: skip
    say(comms.control, format_samples(rows))
    if plan_ranks:
        from nodepint_mpi.bench.planning.network import Network
        from nodepint_mpi.bench.sampling_plan import format_sampling_plan, plan_sampling

        plan = plan_sampling(rows, options, plan_ranks, Network(*network))
        say(comms.control, format_sampling_plan(plan))
        rows = [*rows, *plan]
    finish(comms.control, rows, json_file)
