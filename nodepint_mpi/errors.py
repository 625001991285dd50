"""The errors a user can meet.

Every message says what was given, what was expected and what to do. An error that all ranks
raise together is a `NodepintError` and is printed once, by rank 0; whatever else escapes on one
rank ends the whole job (see `ranks.guard`).
"""


class NodepintError(Exception):
    """Base of all errors with an explanation for the user; raised by all ranks together."""


class ConfigError(NodepintError):
    """A config file, a `--set` value or a combination of options that makes no sense."""


class LayoutError(NodepintError):
    """The ranks do not fit the slices."""


class PlacementError(NodepintError):
    """Ranks that do not fit the GPUs of their machines, or do not know of each other."""


class AgreementError(NodepintError):
    """Ranks that hold different data, shapes or parameters where all must hold the same."""


class ProblemError(NodepintError):
    """A field, a state or a model whose shapes, types or values cannot be used."""


class DataError(NodepintError):
    """A dataset that is missing, empty, damaged or of the wrong kind."""


class CheckpointError(NodepintError):
    """A checkpoint that is missing, damaged, or belongs to another experiment."""


class OutputError(NodepintError):
    """A run directory or file that cannot be written."""


class NonFiniteError(NodepintError):
    """A loss, state or gradient that is no longer a finite number."""


class RankError(NodepintError):
    """One rank failed in a step that all ranks take together; raised on every rank."""


class ReducedModelError(NodepintError):
    """The file of a reduced model that is missing, damaged, or cannot be used here."""
