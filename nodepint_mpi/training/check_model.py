"""The user's parts called once, on shapes: what they return, and what was expected.

What does not fit would else end in JAX's own words somewhere inside the compiled step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.batch import SampleBatch, as_numbers
from nodepint_mpi.core.by_name import asked_for, call
from nodepint_mpi.core.exogenous import Inputs, path_of
from nodepint_mpi.core.objective import OFFERED, Loss, Mean, SimulationFree, Term
from nodepint_mpi.core.sample_noise import SampleNoise
from nodepint_mpi.core.sample_params import SampleArgs
from nodepint_mpi.data.sample_checks import known_inputs
from nodepint_mpi.data.samples import Samples
from nodepint_mpi.errors import DataError, NodepintError, ProblemError
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.training.batch_model import (
    DECODER_TAKES,
    ENCODER_TAKES,
    decode,
    encode,
    require_default_key,
    sample_keys,
    slope_of,
    split_model,
    takes_key,
)

LONGEST = 300
"""Characters of another library's message that are shown."""


def check_model(
    model: EncodeProcessDecode, samples: Samples, noise: SampleNoise | None = None
) -> tuple[int, ...]:
    """The state's shape, or what does not fit between data, encoder, field and decoder. Local.

    The first sample is encoded, and the field and the decoder are called once on its state. With
    `noise` the field is a drift, with a diffusion, and the shape is that of all paths.

    Raises:
        NodepintError: with the part that is wrong, what it returned, and what was expected.
    """
    batch = samples.take(np.array([0]))
    inputs, targets, args = batch.initial, batch.targets, args_of(samples, 0)
    x = jax.eval_shape(as_numbers, jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype))
    asks = asked_for(model.encoder, 1, ENCODER_TAKES)
    if asks:
        for step in (0, None):  # in training, and in evaluation, without a key
            u = _returned(
                "The encoder",
                lambda model, batch: encode(model, batch, 0)[0],
                model,
                batch._replace(step=None if step is None else np.asarray(step)),
                given=f"a sample with {', '.join(asks)}{'' if step == 0 else ' and no key'}",
            )
    else:
        u = _returned("The encoder", model.encoder, x)
    if not _is_array(u, jnp.floating):
        raise ProblemError(
            f"The encoder returned {_describe(u)}; expected one array of real floating-point "
            "numbers, the state."
        )
    time = jax.ShapeDtypeStruct((), u.dtype)
    require_default_key(model.processor)
    for key in (jax.random.key(0), None) if takes_key(model.processor) else (None,):
        slope = _returned(
            "The vector field",
            lambda t, u, args, key: slope_of(model.processor, t, u, args, key),
            time,
            u,
            args,
            key,
            given=f"{_describe(time)} and {_describe(u)}",
        )
        if not _is_array(slope, jnp.floating) or slope.shape != u.shape:
            raise ProblemError(
                f"The vector field returned {_describe(slope)} for a state of {_describe(u)}; "
                "du/dt must be one array of the shape of u and of real floating-point numbers."
            )
    _check_diffusion(model.processor, noise, time, u, args)
    if asked_for(model.decoder, 1, DECODER_TAKES):
        prediction = _returned(
            "The decoder",
            lambda u, batch: decode(model, u[None, None], batch, 0)[0, 0],
            u,
            batch,
            given=_describe(u),
        )
    else:
        prediction = _returned("The decoder", model.decoder, u)
    if not _is_array(prediction, jnp.floating):
        raise ProblemError(
            f"The decoder returned {_describe(prediction)}; expected one array of real "
            "floating-point numbers."
        )
    if samples.section.times is not None and prediction.shape != targets.shape[2:]:
        raise ProblemError(
            f"The decoder returned shape {prediction.shape}, but observations have shape "
            f"{targets.shape[2:]}."
        )
    params, _ = split_model(model)
    if not jax.tree.leaves(params):
        raise ProblemError(
            "The model has no parameters: none of its arrays holds real numbers, so there is "
            "nothing to train. Make weights `jax.Array`s that are fields of an `equinox.Module`."
        )
    name = "Differentiating encoder, vector field and decoder"
    gradient = eqx.filter_grad(lambda everything: _total(*everything))
    _returned(name, gradient, (model, batch, args), given=f"a sample of {_describe(x)}")
    _call_once(model, batch, args, samples)
    return u.shape if noise is None else (*noise.axes, *u.shape)


def _check_diffusion(
    processor: Any, noise: SampleNoise | None, time: Any, u: Any, args: SampleArgs | None
) -> None:
    """A diffusion and the section `[noise]` belong together, and their shapes fit."""
    diffusion = getattr(processor, "diffusion", None)
    if noise is None:
        if callable(diffusion):
            raise ProblemError(
                "The vector field has a method `diffusion`, but the config has no section "
                "`[noise]`: add one, or call the method something else."
            )
        return
    if not callable(diffusion):
        raise ProblemError(
            "`[noise]` needs a vector field with a method `diffusion(t, u, args)`: what the noise "
            "is multiplied with."
        )
    found = _returned("The diffusion", diffusion, time, u, args, given=_describe(u))
    wanted = u.shape if noise.n_dims is None else (*u.shape, noise.n_dims)
    if not _is_array(found, jnp.floating) or found.shape != wanted:
        raise ProblemError(
            f"The diffusion returned {_describe(found)} for a state of {_describe(u)}; "
            f"{noise.kind} noise needs one array of shape {wanted} of real floating-point numbers."
        )


def args_of(samples: Samples, row: int) -> SampleArgs | None:
    """What the field gets of a sample besides its state. Local."""
    section, rows, dtype = samples.section, np.array([row]), jnp.zeros(()).dtype
    if section.inputs is None and section.static is None:
        return None
    inputs = static = None
    if section.inputs is not None:
        knots, values, lengths = known_inputs(samples.split, section, rows)
        own = slice(0, max(2, int(lengths[0])))
        known = jnp.asarray(knots[0, own], dtype), jnp.asarray(values[0, own], dtype)
        until = jnp.asarray(knots[0, lengths[0] - 1], dtype)
        inputs = Inputs(path_of(section.interpolation, *known), jnp.zeros((), dtype), until)
    if section.static is not None:
        static = jnp.asarray(samples.take(rows).static[0], dtype)
    return SampleArgs(inputs, static)


def check_losses(
    losses: Mapping[str, Loss],
    prediction: Any,
    targets: Any,
    offered: Mapping[str, Any] | None = None,
) -> None:
    """Check that losses and metrics return a `Mean`. Local; nothing is computed.

    Args:
        losses: The functions, by what a message calls them.
        prediction: Shape and type of predictions, (times, samples, ...).
        targets: Those of the observations that they are compared with.
        offered: What they may take by name, in shapes.

    Raises:
        ProblemError: with what one of them returned, or how it failed.
    """
    wanted = (
        "expected `nodepint_mpi.Mean(sum, count)` of two real numbers, from which the ranks make "
        "the mean"
    )
    for name, function in losses.items():
        given = f"predictions of {_describe(prediction)} and targets of {_describe(targets)}"
        made = _returned(name, _with(function), prediction, targets, offered or {}, given=given)
        parts = (made.sum, made.count) if isinstance(made, Mean) else ()
        if not parts:
            raise ProblemError(f"{name} returned {_describe(made)} for {given}; {wanted}.")
        for part, field in zip(parts, ("sum", "count"), strict=True):
            kinds = (jnp.floating,) if field == "sum" else (jnp.floating, jnp.integer)
            if not any(_is_array(part, kind) for kind in kinds) or part.shape != ():
                raise ProblemError(
                    f"{name} returned a `Mean` whose `{field}` is {_describe(part)}; {wanted}."
                )


def check_gradient(
    loss: Loss, prediction: Any, targets: Any, offered: Mapping[str, Any] | None = None
) -> None:
    """Check that a loss can be differentiated. Local; nothing is computed.

    Raises:
        ProblemError: with the reason.
    """
    given = f"predictions of {_describe(prediction)}"
    made = _with(loss)
    gradient = eqx.filter_grad(lambda *arguments: made(*arguments).sum)
    name = "Differentiating the loss"
    _returned(name, gradient, prediction, targets, offered or {}, given=given)


def require_taken(losses: Mapping[str, Loss], name: str, why: str) -> None:
    """Refuse losses and metrics that do not take by name what the data have. Local.

    Raises:
        ProblemError: with the first that does not.
    """
    for what, function in losses.items():
        if name not in asked_for(function, 2, OFFERED):
            raise ProblemError(
                f"{what} does not take `{name}`, but {why}: give its function a parameter "
                f"`{name}`, as in `def loss(predictions, targets, {name}): ...`."
            )


def check_terms(
    terms: Sequence[Term], model: EncodeProcessDecode, batch: SampleBatch, n_samples: int
) -> None:
    """Check what is added to the loss, on shapes. Local.

    Raises:
        ProblemError: with what one of them returned, or how it failed.
    """
    for term in terms:
        name = f"The loss term {getattr(term.function, '__name__', 'of the config')!r}"
        made = _of_model(name, term.function, model, batch)
        if not _is_array(made, jnp.floating) or made.shape not in ((), (n_samples,)):
            raise ProblemError(
                f"{name} returned {_describe(made)} for a batch of {n_samples} samples; expected "
                "one real number, or one for each sample."
            )


def check_simulation_free(
    loss: SimulationFree, model: EncodeProcessDecode, batch: SampleBatch, n_samples: int
) -> None:
    """Check a loss for which nothing is solved, on shapes. Local.

    Raises:
        ProblemError: with what it returned, or how it failed.
    """
    made = _of_model("The loss", loss.function, model, batch)
    if not _is_array(made, jnp.floating) or made.shape != (n_samples,):
        raise ProblemError(
            f"The loss returned {_describe(made)} for a batch of {n_samples} samples; expected one "
            "real number for each sample."
        )


def _of_model(name: str, function: Callable, model: EncodeProcessDecode, batch: SampleBatch) -> Any:
    """What a function of the model and the batch returns, and that it has a gradient."""

    def made(model, batch):
        return call(function, model, offered={"batch": batch, "key": sample_keys(0, batch)})

    given = "the model and a batch"
    values = _returned(name, made, model, batch, given=given)
    if _is_array(values, jnp.floating):
        gradient = eqx.filter_grad(lambda model, batch: jnp.sum(made(model, batch)))
        _returned(f"{name}, differentiated,", gradient, model, batch, given=given)
    return values


def _with(function: Callable) -> Callable:
    """A loss with what it may take by name as one argument."""
    return lambda made, wanted, offered: call(function, made, wanted, offered=offered)


def _total(model: EncodeProcessDecode, batch: SampleBatch, args: Any) -> jax.Array:
    """A number that everything in the model enters."""
    u = encode(model, batch, 0)[0]
    slope = slope_of(model.processor, jnp.zeros((), u.dtype), u, args, None)
    parts = (u, slope, decode(model, u[None, None], batch, 0))
    return sum((jnp.sum(part) for part in parts), jnp.zeros((), u.dtype))


def _returned(name: str, function: Callable, *arguments: Any, given: str = "") -> Any:
    """Shapes of what a part returns; its failure in one sentence."""
    given = given or " and ".join(_describe(one) for one in arguments)
    try:
        return eqx.filter_eval_shape(function, *arguments)
    except NodepintError as error:
        raise type(error)(str(error).partition("\n---")[0]) from error  # JAX has added to it
    except Exception as error:  # anything that the user's code can raise
        raise ProblemError(f"{name} failed for {given}: {shorten(error)}") from error


def _call_once(model: EncodeProcessDecode, batch: SampleBatch, args: Any, samples: Samples) -> None:
    """With the numbers of the first sample: what only numbers show, as in a callback."""

    @eqx.filter_jit
    def call_all(model, batch, args, t):
        u = encode(model, batch, 0)[0]
        slope = slope_of(model.processor, t, u, args, None)
        return u, slope, decode(model, u[None, None], batch, 0)

    try:
        start = jnp.asarray(float(samples.times[0]), jnp.zeros(()).dtype)
        state, slope, _ = jax.device_get(call_all(model, batch, args, start))
    except Exception as error:  # anything that the user's code can raise
        raise ProblemError(
            "Calling encoder, vector field and decoder on the first sample failed: "
            f"{shorten(error)}"
        ) from error
    if not np.all(np.isfinite(state)):
        raise DataError(
            "The encoder turns the first sample into NaN or infinity; a `positive` network needs "
            "observations above zero."
        )
    del slope  # where it is not finite, the step that meets it says so


def _is_array(value: Any, kind: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct) and jnp.issubdtype(value.dtype, kind)


def _describe(value: Any) -> str:
    """Shape and type of arrays; the type of anything else."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"shape {value.shape} and type {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def shorten(error: BaseException) -> str:
    """An exception in one line: its kind, and what it says first or, of a callback, last. Local."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[0]
    if "Traceback" in str(error):  # of a callback, whose own exception comes last
        text = next((line for line in reversed(lines) if _names_exception(line)), lines[-1])
        return text[:LONGEST]
    return f"{type(error).__name__}: {text}"[:LONGEST]


def _names_exception(line: str) -> bool:
    kind = line.partition(":")[0]
    return kind.isidentifier() and kind.endswith(("Error", "Exception"))
