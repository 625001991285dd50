"""From `data.source = "file.py:function"` to the folder of what that function makes."""

import inspect
from pathlib import Path
from typing import Any

from mpi4py import MPI

from nodepint_mpi.build.imports import import_object
from nodepint_mpi.build.objects import is_object
from nodepint_mpi.config.embedded import code_of
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.agreement import together

KEY = "data.source"


def with_own_data(config: Config) -> Config:
    """The config with the folder of the data in the place of the function that makes them. Local.

    The data are made unless they are there. The same config if its source is no function.

    Raises:
        NodepintError: if the function does not exist or returns something else.
    """
    data = config.data
    if data is None or not data.is_made:
        return config
    from nodepint_mpi.data.made import content_of, make_own_data  # loads `datasets`

    function = import_object(data.source, KEY)
    if is_object(data.source) and not callable(function):
        given, code = function, content_of(function, data.source)

        def function():
            return given

    else:
        code = _code(function, data.source)
    folder = make_own_data(
        function, data.source, code, data.options, missing=data.missing is not None
    )
    made = data.model_copy(update={"source": folder.as_posix(), "options": {}})
    return config.model_copy(update={"data": made})


def share_own_data(control: MPI.Intracomm, config: Config) -> Config:
    """The same on all ranks: rank 0 makes the data. Collective over `control`.

    Raises:
        NodepintError: on all ranks.
    """
    if config.data is None or not config.data.is_made:
        return config
    made = config
    with together(control):
        if control.rank == 0:
            made = with_own_data(config)
    return control.bcast(made)


def _code(function: Any, name: str) -> str:
    """The code of the file that a function is in."""
    try:
        source = inspect.getsourcefile(function)
    except TypeError:
        source = None
    if source is None or not callable(function):
        raise ConfigError(f'`{KEY} = "{name}"` must name a function written in Python.')
    return code_of(Path(source).read_text(encoding="utf-8-sig"))
