"""Compiled programs kept between runs, in a folder of the user's own.

JAX keeps programs, too; it hands over its module (jax/_src/compilation_cache.py) and finds them by
what they compute, the options and the compiler's version. Here are added: programs that send
messages, which JAX finds again only by chance (`parallel.handles`); what else a program depends on,
as a folder for each processor and each set of libraries; and files that a rank which dies while it
writes, a full disk or another rank cannot leave half done.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import logging
import os
import platform
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax._src import cache_key, compilation_cache, compiler
from mpi4py import MPI

from nodepint_mpi.parallel.handles import (
    UnknownCallError,
    sends_messages,
    with_handles,
    without_handles,
)

MOST_BYTES = 2 * 1024**3
"""Of a folder of programs, where the least recently used ones go."""

FOLDER = "jax_compilation_cache_dir"
"""JAX's setting, which also `JAX_COMPILATION_CACHE_DIR` sets."""

_SUFFIX = ".program"
_VERSION = "1"  # of what is written here
_KNOWN = ["backend", "computation", "devices", "compile_options", "host_callbacks",
          "executable_devices", "pgle_profiler"]  # fmt: skip

_WHOLE = compiler.compile_or_get_cached

_log = logging.getLogger(__name__)


class ProgramFiles:
    """Serialized programs by key, one file each, with a checksum. Local.

    What cannot be read or written is missing: it will be compiled. It has the form of JAX's
    `CacheInterface`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """What was put, or None. It counts as used."""
        path = self._file(key)
        try:
            kept = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        program = kept[32:]
        if hashlib.sha256(program).digest() == kept[:32]:
            return program
        with contextlib.suppress(OSError):  # damaged: out of the way of a good one
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program: whole or not at all, whoever else writes it."""
        try:
            number, written = tempfile.mkstemp(dir=self._path, prefix=".new-")
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                os.replace(written, self._file(key))
            except BaseException:
                os.unlink(written)
                raise
        except OSError as error:
            if not self._warned:
                _log.info("compiled programs are not kept: %s: %s", self._path, error.strerror)
            self._warned = True

    def clear(self) -> None:
        """Nothing: other processes may use the files."""

    def prune(self, most_bytes: int = MOST_BYTES) -> None:
        """Remove those used least recently until the others take at most so much."""
        kept = []
        with contextlib.suppress(OSError):
            for path in self._path.iterdir():
                with contextlib.suppress(OSError):
                    found = path.stat()
                    if path.suffix == _SUFFIX:
                        kept.append((found.st_mtime, found.st_size, path))
                    elif path.name.startswith(".new-") and time.time() - found.st_mtime > 86400:
                        path.unlink()  # of a rank that died
        left = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if left <= most_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            left -= size

    def _file(self, key: str) -> Path:
        return self._path / (key + _SUFFIX)


def keep_programs(setting: str, *, prune: bool = False) -> Path | None:
    """Keep compiled programs between processes from now on. Local; the setting may differ by rank.

    Where JAX's own setting names a folder (`JAX_COMPILATION_CACHE_DIR`), programs go there, and
    `setting` has no effect. A folder that cannot be made is not used, nor one to which others may
    write.

    Args:
        setting: "auto" for `nodepint_mpi/programs` in the user's cache folder, "off" for none, or
            a folder.
        prune: Whether to remove programs that have not been used for long; on one rank.

    Returns:
        Where programs are kept, or None.
    """
    given = getattr(jax.config, FOLDER)
    if given and Path(given).name != _surroundings():
        _keep_in(ProgramFiles(Path(given)), with_own_files=False)
        return Path(given)
    if given:  # of an earlier run in this process
        jax.config.update(FOLDER, None)
        compilation_cache.reset_cache()
        compiler.compile_or_get_cached = _WHOLE
    if setting == "off":
        return None
    folder = make_folder(setting)
    if folder is None:
        return None
    files = ProgramFiles(folder)
    if prune:
        files.prune()
    jax.config.update(FOLDER, str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _keep_in(files, with_own_files=True)
    return folder


def make_folder(setting: str) -> Path | None:
    """The folder for programs of this processor and these libraries, made if needed. Local.

    None, with a line in the log, if it cannot be made or others may write to it.
    """
    root = _cache_folder() / "programs" if setting == "auto" else Path(setting).expanduser()
    folder = root.absolute() / _surroundings()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _reason_against(root) or _reason_against(folder)
    except OSError as error:
        reason = str(error.strerror)
    if reason is None:
        return folder
    _log.info("compiled programs are not kept: %s: %s", folder, reason)
    return None


def _cache_folder() -> Path:
    """The user's folder for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "nodepint_mpi"


def _reason_against(folder: Path) -> str | None:
    """Why programs in a folder are not to be trusted: to load one is to run it."""
    found = folder.stat()
    if found.st_uid != os.geteuid():
        return "it belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it: `chmod go-w` it, or give another `run.compile_cache`"
    return None


def _surroundings() -> str:
    """Names what a program depends on besides its text and the compiler's options."""
    names = ("jax", "jaxlib", "mpi4jax", "mpi4py")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    held = [_VERSION, *versions, MPI.Get_library_version(), platform.platform(), _processor()]
    return hashlib.sha256("\n".join(held).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor and its instructions, as far as the system says."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _keep_in(files: ProgramFiles, *, with_own_files: bool) -> None:
    """Let JAX keep programs in `files`: those with messages, and if asked all others."""
    if list(inspect.signature(_WHOLE).parameters) != _KNOWN:
        _log.info("this JAX compiles in another way: programs with messages are not kept")
        return
    # Profiles read phases and channels of operations in a program's metadata, by which alone two
    # programs may differ.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if with_own_files:
        compilation_cache.get_file_cache = lambda path: (files, path)
    compiler.compile_or_get_cached = compile_with(files)


def compile_with(files: ProgramFiles) -> Callable[..., Any]:
    """What compiles in place of JAX's own: programs with messages are looked for in `files`."""

    def compile_or_find(
        backend, computation, devices, compile_options, host_callbacks, executable_devices,
        pgle_profiler=None,
    ):  # fmt: skip
        if not sends_messages(computation):
            return _WHOLE(
                backend, computation, devices, compile_options, host_callbacks,
                executable_devices, pgle_profiler,
            )  # fmt: skip
        if backend.platform == "cpu" and not host_callbacks:
            try:
                module, handles = without_handles(computation)
                key = "messages-" + cache_key.get(module, devices, compile_options, backend)
                kept = files.get(key)
                if kept is not None:
                    program = zlib.decompress(kept)
                else:
                    made = compiler.backend_compile_and_load(
                        backend, module, executable_devices, compile_options, host_callbacks
                    )
                    program = backend.serialize_executable(made)
                    with_handles(program, handles)  # else it is not kept
                    files.put(key, zlib.compress(program, 1))
                own = with_handles(program, handles)
                return backend.deserialize_executable(own, executable_devices, compile_options)
            except (UnknownCallError, jax.errors.JaxRuntimeError) as error:
                _log.debug("a program with messages is not kept: %s", error)
        # Not by JAX's own way: found by addresses, it would hardly be found again.
        return compiler.backend_compile_and_load(
            backend, computation, executable_devices, compile_options, host_callbacks
        )

    return compile_or_find
