"""The reason that the system gave for an error. Loads neither HDF5 nor, with it, MPI."""

import os


def error_text(error: BaseException) -> str:
    """What went wrong, without HDF5's internals where the system gave a reason. Local."""
    code = getattr(error, "errno", None)
    return os.strerror(code) if code else (str(error) or type(error).__name__)
