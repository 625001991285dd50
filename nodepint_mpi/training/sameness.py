"""What must be the same on all ranks: code, data and shapes once, parameters again and again.

Ranks with other shapes than their neighbors would wait for messages that are never sent, or
compute wrong numbers without a word. So the shapes are compared before the first message, and the
values while the run goes on: a replica that has drifted is found before it is saved.
"""

import jax
from jaxtyping import PyTree
from mpi4py import MPI

from nodepint_mpi.build.user_code import LoadedCode
from nodepint_mpi.errors import AgreementError
from nodepint_mpi.io.leaves import checksum, describe_leaves, take_leaves
from nodepint_mpi.ranks.agreement import find_difference, together


def require_same_code(control: MPI.Intracomm, code: LoadedCode) -> None:
    """Make sure that all ranks compute with the same source files. Collective over `control`.

    Modules that only some ranks have loaded are left out: rank 0 draws and writes for all.

    Raises:
        AgreementError: on all ranks, with file and ranks.
        NodepintError: on all ranks, if importing failed on any.
    """
    with together(control):
        if code.error is not None:
            raise code.error
    digests = code.digests
    names = control.allgather(list(digests))
    everywhere = set(digests).intersection(*names)
    held = {name: f"digest {digests[name]}" for name in digests if name in everywhere}
    difference = find_difference(control, dict(sorted(held.items(), key=lambda one: one[0])))
    if difference is not None:
        odd, more = difference.odd, difference.n_names - 1
        raise AgreementError(
            f"The source code differs between ranks: {difference.name} has {odd.value} on "
            f"{odd.who}, {odd.usual} on {odd.usual_who}"
            f"{f' (and {more} more differ)' if more else ''}. Copy the same files to all machines, "
            "or keep them on a file system that all machines see."
        )


def require_same_shapes(
    control: MPI.Intracomm, trees: dict[str, PyTree], state: jax.ShapeDtypeStruct
) -> None:
    """Make sure that all ranks compute with the same shapes and types, on the same kind of device.

    Collective over `control`.

    Args:
        control: The ranks.
        trees: What is equal on all ranks, by name.
        state: Shape of the states of a batch.

    Raises:
        AgreementError: on all ranks, with who has what.
    """
    held = {"the device": jax.default_backend(), "the state": f"{state.dtype}{list(state.shape)}"}
    for part, tree in trees.items():  # in this order, not the alphabet's
        held |= {name: str(spec) for name, spec in describe_leaves({part: tree}).items()}
    difference = find_difference(control, held)
    if difference is not None:
        odd, more = difference.odd, difference.n_names - 1
        raise AgreementError(
            f"The model differs between ranks: {difference.name} is {odd.value} on {odd.who}, "
            f"{odd.usual} on {odd.usual_who}{f' (and {more} more differ)' if more else ''}. Code "
            "and files that a network is made from must be the same on all machines; "
            "`nodepint doctor --mpi` shows what else differs."
        )


def require_same_values(
    control: MPI.Intracomm, trees: dict[str, PyTree], step: int, since: int | None
) -> None:
    """Make sure that all ranks hold the same bits. Collective over `control`.

    Reads all values once, as fast as memory gives them; sends 16 bytes.

    Args:
        control: The ranks.
        trees: Parameters and optimizer state, by name.
        step: Optimizer steps taken.
        since: When they were last equal, or None at the start.

    Raises:
        AgreementError: on all ranks, with step, ranks and the first array that differs.
    """
    held = {}
    for part, tree in trees.items():  # in this order, not the alphabet's
        held |= {name: f"{checksum(a, name):016x}" for name, a in take_leaves({part: tree}).items()}
    difference = find_difference(control, held)
    if difference is not None:
        odd, more = difference.odd, difference.n_names - 1
        what = "parameters have drifted apart" if since is not None else "parameters differ"
        known = "" if since is None else f" They were equal at step {since}."
        raise AgreementError(
            f"Step {step}: {what}: {odd.who} holds other values of {difference.name} than "
            f"{odd.usual_who}{f', and of {more} more arrays' if more else ''}.{known} This "
            "step has not been saved. Different machines or libraries, a network that depends on "
            f"the rank, or faulty memory can cause this. {_after_drift(since)}"
        )


def _after_drift(since: int | None) -> str:
    """What to do: ranks that drift do so again, and sooner, wherever they resume."""
    looked = "Look with `nodepint doctor --mpi`, and remove what differs"
    if since is None:
        return f"{looked}; as it is, the run would stop here again."
    return (
        f"{looked}, or leave out the machine that is named; only then go on with `--resume auto`. "
        "If nothing differs, make sure that `[network]` does not depend on the rank, on time or "
        "on random numbers other than its key: such a run drifts again."
    )
