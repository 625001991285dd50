"""One TOML file per experiment: its sections, their defaults, and what they refuse.

Sections are frozen pydantic models. A key nobody knows, a value of the wrong type and options
that contradict each other are a `ConfigError` that names the key and the nearest valid one.
"""

import copy
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from nodepint_mpi.config.control import ControlSection, check_control
from nodepint_mpi.config.data import DataSection
from nodepint_mpi.config.embedded import extract_config, is_python, name_home
from nodepint_mpi.config.errors import explain_validation
from nodepint_mpi.config.loss import PATH_LOSSES, LossSection
from nodepint_mpi.config.network import (
    ConvNetwork,
    DenseNetwork,
    GrowthSection,
    Network,
    UserNetwork,
)
from nodepint_mpi.config.noise import NoiseSection
from nodepint_mpi.config.optim import OptimSection
from nodepint_mpi.config.run import OutputSection, RunSection
from nodepint_mpi.config.section import Section
from nodepint_mpi.config.time import Time
from nodepint_mpi.errors import ConfigError


def _check_initial(given: list[Any]) -> list[Any]:
    """Numbers, or rows of them."""
    rows = given if given and all(isinstance(row, list) for row in given) else [given]
    numbers = [number for row in rows for number in row]
    if not numbers or len({len(row) for row in rows}) > 1:
        raise ValueError("is one state, a list of numbers, or several of equal length")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"holds {number!r}; expected numbers")
        if not math.isfinite(number):
            raise ValueError(f"holds {number!r}; expected finite numbers")
    return [[float(x) for x in row] for row in rows] if rows is given else [float(x) for x in given]


class ProblemSection(Section):
    """One initial-value problem for `nodepint solve` or `nodepint control`.

    `field` is a known name or an import path, with a section `[control]` also "run:DIRECTORY", the
    field that a training run has learned; `initial` may then hold several initial states, of which
    the mean cost is taken.
    """

    field: str
    args: dict[str, float] = {}
    initial: Annotated[list[Any], AfterValidator(_check_initial)] | None = None
    box: list[list[float] | float] | None = Field(default=None, min_length=2, max_length=2)

    @property
    def several(self) -> bool:
        """Whether there are several initial states."""
        return bool(self.initial) and isinstance(self.initial[0], list)


class Config(Section):
    """A whole experiment. `train` needs data, network, loss and optim, `solve` problem, and
    `control` problem and control."""

    run: RunSection
    time: Time
    data: DataSection | None = None
    network: Network | None = None
    growth: GrowthSection | None = None
    noise: NoiseSection | None = None
    loss: LossSection | None = None
    optim: OptimSection = OptimSection()
    output: OutputSection = OutputSection()
    problem: ProblemSection | None = None
    control: ControlSection | None = None

    @model_validator(mode="after")
    def _relaxation(self):
        if self.time.relaxation is not None:
            if self.data is None or self.data.times is None:
                raise ValueError("`[time.relaxation]` is for trajectories: it needs `data.times`")
            if self.time.method == "reduced":
                raise ValueError("`[time.relaxation]` goes with any method but 'reduced'")
            if self.data.initial is not None:
                raise ValueError(
                    "`[time.relaxation]` encodes the observations at slice edges: it needs "
                    "`data.input`, not `data.initial`"
                )
        return self

    @model_validator(mode="after")
    def _basis_ranks(self):
        n, time, random = self.run.basis_ranks, self.time, self.optim.random_basis
        if random is not None and random.dims < n:
            raise ValueError(
                f"`run.basis_ranks = {n}` are more than the {random.dims} directions of "
                "`optim.random_basis.dims`, which they share"
            )
        if n == 1 or ":" in time.method:  # a method of the user's own says so itself
            return self
        if time.method != "tangent":
            if random is not None:
                return self
            raise ValueError(
                f"`run.basis_ranks = {n}` shares tangents, and `time.method = '{time.method}'` has "
                "none: take 'tangent', `[optim.random_basis]`, or `run.basis_ranks = 1`"
            )
        if time.basis is not None and time.basis.rank is not None and time.basis.rank < n:
            raise ValueError(
                f"`run.basis_ranks = {n}` are more than the {time.basis.rank} directions of "
                "`time.basis.rank`, which they share"
            )
        return self

    @model_validator(mode="after")
    def _random_basis(self):
        random = self.optim.random_basis
        if random is None or random.by == "projection":
            return self
        refused = {"tracking": self.time.tracking, "relaxation": self.time.relaxation}
        for key, given in refused.items():
            if given is not None:
                raise ValueError(
                    f"`optim.random_basis.by = 'tangents'` solves forward in time only, and "
                    f"`[time.{key}]` needs the adjoint: take 'projection', or remove it"
                )
        return self

    @model_validator(mode="after")
    def _given_fields(self):
        data = self.data
        if data is None:
            return self
        if (data.inputs or data.static) and self.time.method == "reduced":
            raise ValueError("`data.inputs` and `data.static` go with any method but 'reduced'")
        jumps = data.inputs is not None and data.interpolation == "constant"
        if jumps and self.time.adjoint.kind == "continuous":
            raise ValueError(
                "piecewise constant `data.inputs` need `time.adjoint.kind = 'discrete'`: the steps "
                "of the continuous adjoint do not end where inputs jump"
            )
        return self

    @model_validator(mode="after")
    def _noise(self):
        if self.noise is None:
            return self
        if self.data is None and self.problem is None:
            raise ValueError("`[noise]` needs a section `[problem]` to solve, or `[data]` to train")
        if self.data is None and self.noise.paths == "fresh":
            raise ValueError("`noise.paths = 'fresh'` is for training: a solve has no steps")
        if self.problem is not None and self.problem.box is not None:
            raise ValueError("`problem.box` scales a field without noise")
        if self.time.method == "reduced":
            raise ValueError("`[noise]` goes with any method but 'reduced'")
        if self.time.adjoint.kind == "continuous":
            raise ValueError("`[noise]` needs `time.adjoint.kind = 'discrete'`")
        if self.time.relaxation is not None and self.noise.n_paths is not None:
            raise ValueError(
                "`[time.relaxation]` starts slices from what was observed: it takes no "
                "`noise.n_paths`"
            )
        several = self.loss is not None and self.loss.name in PATH_LOSSES
        known = self.loss is not None and ":" not in self.loss.name
        if known and several != (self.noise.n_paths is not None):
            raise ValueError(
                f"`noise.n_paths` belongs to losses of several paths: {' or '.join(PATH_LOSSES)}, "
                "or one of your own"
            )
        if self.time.tracking is not None and self.noise.paths == "fresh":
            raise ValueError(
                "`noise.paths = 'fresh'` draws other paths in each step, and `[time.tracking]` "
                "starts from the states of the last one: take 'common', or remove `[time.tracking]`"
            )
        return self

    @model_validator(mode="after")
    def _layers(self):
        if isinstance(self.network, ConvNetwork) and self.network.layers is not None:
            if self.time.horizon != [0.0, self.network.layers]:
                raise ValueError(
                    "`network.layers` counts units of time: `time.horizon` must run from 0 to it"
                )
        return self

    @model_validator(mode="after")
    def _growth(self):
        if self.growth is None:
            return self
        if isinstance(self.network, ConvNetwork) and self.network.layers is not None:
            raise ValueError(
                "`[growth]` is for weights that are the same at all times: no `layers`"
            )
        if any(step % self.optim.accumulate for step in self.growth.steps):
            raise ValueError(
                "`growth.steps` must be multiples of `optim.accumulate`: gradients of networks of "
                "two sizes have no mean"
            )
        match self.network:
            case DenseNetwork(latent=int(size)) | ConvNetwork(channels=size):
                if self.growth.sizes[0] <= size:
                    raise ValueError(f"`growth.sizes` must begin above the first size, {size}")
            case _:
                raise ValueError(
                    "`[growth]` needs `network.name = 'mlp'` with `latent`, or 'conv': no other "
                    "network is known to grow"
                )
        return self

    @model_validator(mode="after")
    def _validation(self):
        if self.data is not None and self.data.is_validated:
            return self
        given = {
            "run.validate_every": self.run.validate_every,
            "run.patience": self.run.patience,
            "output.best": self.output.best,
        }
        for key, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{key}` needs a validation set: give `data.valid_split`, the name of a "
                    "split, or `data.valid_fraction`, a share of the training rows, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _control(self):
        if self.control is not None:
            check_control(self)
        elif self.problem is not None and self.problem.several:
            raise ValueError("`problem.initial` holds several states: that is for `[control]`")
        return self

    def network_at(self, step: int) -> DenseNetwork | ConvNetwork | UserNetwork | None:
        """The network that takes the optimizer step after `step` are done. Local."""
        if self.growth is None or self.network is None:
            return self.network
        plan = zip(self.growth.steps, self.growth.sizes, strict=True)
        grown = [size for when, size in plan if when <= step]
        if not grown:
            return self.network
        key = "channels" if isinstance(self.network, ConvNetwork) else "latent"
        return self.network.model_copy(update={key: grown[-1]})

    def fingerprint(self) -> str:
        """Names the experiment: what must not change when a run is resumed. Local.

        Length, output, timeouts and where it runs may change, the number of ranks, and how they
        solve the coarse problem.
        """
        left_out = {"output"} if self.control is not None else {"output", "problem", "control"}
        identity = self.model_dump(mode="json", exclude=left_out)
        where = ("data_ranks", "basis_ranks", "share_gpus", "cuda_mpi")
        where += ("sharded_update", "dealt_encoder", "compile_cache")
        length = ("n_steps", "n_epochs", "validate_every", "patience", "min_delta")
        for key in ("name", "hang_timeout_s", "compare_every", *length, *where):
            del identity["run"][key]
        _drop_none(identity, ("noise",))
        _drop_none(identity["time"], ("levels",))
        if identity["time"]["basis"] is not None:
            del identity["time"]["basis"]["recurrence"]
        if identity["loss"] is not None:
            del identity["loss"]["metrics"]
            _drop_none(identity["loss"], ("terms",))
        _drop_none(identity["optim"], ("schedule_options", "groups", "average", "random_basis"))
        if identity["optim"]["accumulate"] == 1:
            del identity["optim"]["accumulate"]
        options = identity["optim"]["options"]
        for key, value in options.items():  # as before there were other options than such numbers
            if type(value) is int and abs(value) < 2**63:
                options[key] = float(value)
        if identity["data"] is not None:  # as before there were such keys
            added = ("initial", "mask", "missing", "weights", "static", "inputs", "input_times")
            _drop_none(identity["data"], (*added, "valid_split", "valid_fraction"))
            if self.data is not None and self.data.inputs is None:
                del identity["data"]["interpolation"]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _drop_none(section: dict[str, Any], names: Sequence[str]) -> None:
    """Leave out what is not given: keys that are younger than some fingerprints."""
    for name in names:
        if not section[name]:
            del section[name]


Overrides = Sequence[str] | Mapping[str, Any]
"""`section.key=value`, the value in TOML, as words of the command line; or values by key."""


def read_config(path: str | Path, overrides: Overrides = ()) -> Config:
    """Read a config file, or the `CONFIG` of a Python file, and apply `--set` overrides. Local.

    Raises:
        ConfigError: if the file cannot be read, is no TOML, or makes no sense.
    """
    text = read_text(path)
    if is_python(path):
        text = extract_config(text, str(path))
        return parse_config(text, overrides, source=f"CONFIG in {path}", home=str(path))
    return parse_config(text, overrides, source=str(path))


def parse_config(
    text: str, overrides: Overrides = (), *, source: str = "config", home: str | None = None
) -> Config:
    """Parse and validate the text of a config file. Local; see `read_config`.

    Args:
        text: TOML.
        overrides: What is set besides.
        source: For messages.
        home: The Python file that `":name"` is looked for in.
    """
    data = parse_toml(text, source)
    seen: set[str] = set()
    by_key = isinstance(overrides, Mapping)
    for key, value in overrides.items() if by_key else map(_parse_override, overrides):
        if key in seen:
            raise ConfigError(f"`--set {key}=...` is given twice; give it once.")
        seen.add(key)
        _assign(data, key, value)
    lengths = {"run.n_steps", "run.n_epochs"}
    if len(seen & lengths) == 1:  # what is set replaces the length in the file
        (other,) = lengths - seen
        data["run"].pop(other.removeprefix("run."), None)
    if home is not None:
        name_home(data, home)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain_validation(error, Config, source)) from None


def read_text(path: str | Path) -> str:
    """The text of a config file. Local.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # editors may begin it with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot read the config file {path}: {reason}.") from error


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The tables of a TOML text. Local.

    Raises:
        ConfigError: if it is no TOML; `source` is its name.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}.") from error


def _parse_override(text: str) -> tuple[str, Any]:
    """`a.b=value`, the value in TOML; what is no TOML is a string."""
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"`--set {text}` is not of the form `section.key=value`.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value.strip()


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables."""
    *path, last = key.split(".")
    table = data
    for i, part in enumerate(path):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"`--set {key}=...`: `{'.'.join(path[: i + 1])}` is a value, not a section."
            )
    table[last] = copy.deepcopy(value)
