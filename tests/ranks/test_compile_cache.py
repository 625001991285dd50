"""Programs kept between processes: sums over the right communicators, intact files."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mpi4jax
import pytest
from jax._src import compiler
from mpi4py import MPI

from nodepint_mpi.parallel.comms import alone
from nodepint_mpi.parallel.handles import UnknownCallError, with_handles, without_handles
from nodepint_mpi.ranks.compile_cache import ProgramFiles, compile_with, make_folder

ROLES = Path(__file__).with_name("roles.py")


SETTINGS = """
import sys
import jax
from nodepint_mpi.ranks.compile_cache import keep_programs

for setting in sys.argv[1:]:
    folder = keep_programs(setting)
    before = list(folder.glob("*")) if folder else []
    assert jax.jit(lambda x: x + len(sys.argv))(1) == 1 + len(sys.argv)
    print(len(list(folder.glob("*"))) > len(before) if folder else None)
"""


@pytest.mark.mpi(max_size=1)
def test_every_run_of_a_process_has_its_own_setting(tmp_path):
    """In a new process: the setting is JAX's, and of all that it compiles."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    command = [sys.executable, "-c", SETTINGS, "off", one, "off", other]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "True", "None", "True"], done.stderr
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "jax")
    done = subprocess.run([*command[:3], one], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "jax").is_dir()


@pytest.mark.mpi(max_size=1)
def test_another_process_sums_over_its_own_communicators(mpirun, tmp_path):
    """A program found by its text is used for communicators in other roles and places in memory,
    and for another reduction, which is a handle, too."""
    found = []
    for roles in (("pair", "alone", "SUM"), ("alone", "pair", "SUM"), ("alone", "pair", "MAX")):
        done = mpirun(2, sys.executable, ROLES, tmp_path, *roles, timeout_s=100)
        assert done.returncode == 0, done.stderr
        found.append(ast.literal_eval(done.stdout))
    pair_first, alone_first, largest = found
    assert pair_first["results"] == [31, 32]
    assert alone_first == {"results": [13, 23], "compiled": [0, 0]}
    assert largest == {"results": [12, 22], "compiled": [0, 0]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Programs of this test are kept in these files."""
    kept = ProgramFiles(tmp_path)
    monkeypatch.setattr(compiler, "compile_or_get_cached", compile_with(kept))
    return kept


@pytest.mark.mpi(max_size=2)
def test_equal_programs_on_other_communicators_are_compiled_once(comm, files, monkeypatch):
    size, single = comm.Get_size(), alone().Dup()
    whole, compiled = compiler.backend_compile_and_load, []

    def compile_and_count(backend, module, *options):
        compiled.append("mpi_allreduce" in str(module))
        return whole(backend, module, *options)

    monkeypatch.setattr(compiler, "backend_compile_and_load", compile_and_count)
    x = jnp.full(2, 1.0)
    for line, sum_over_it in ((comm, size), (single, 1), (comm, size)):

        @jax.jit
        def total(x, line=line):
            # A loop: the call is in a computation of its own.
            return jax.lax.fori_loop(0, 3, lambda _, y: mpi4jax.allreduce(y, MPI.SUM, comm=line), x)

        assert total(x).tolist() == [sum_over_it**3] * 2
    assert sum(compiled) == 1
    jax.effects_barrier()
    single.Free()


@pytest.mark.mpi(max_size=1)
def test_programs_that_differ_in_the_names_of_phases_are_told_apart(files, tmp_path):
    """A profile of the second would else tell of the phases of the first."""
    line, texts = alone().Dup(), []
    for name in ("phase.coarse", "phase.update"):

        @jax.jit
        def total(x, name=name):
            with jax.named_scope(name):
                return mpi4jax.allreduce(x, MPI.SUM, comm=line)

        texts.append(total.lower(jnp.full(2, 1.0)).compile().as_text())
    assert "phase.coarse" in texts[0] and "phase.update" in texts[1]
    assert len(list(tmp_path.glob("messages-*"))) == 2
    line.Free()


@pytest.mark.mpi(max_size=1)
def test_a_program_that_knows_an_address_is_not_kept(files, tmp_path):
    """The status of a message, where mpi4jax is to write to it, is no handle."""
    status = MPI.Status()
    line = alone().Dup()

    @jax.jit
    def talk(x):
        return mpi4jax.sendrecv(x, x, 0, 0, comm=line, status=status)

    assert talk(jnp.full(2, 3.0)).tolist() == [3, 3]
    assert status.Get_count(MPI.BYTE) == 16
    assert not [path for path in tmp_path.iterdir() if "messages" in path.name]
    line.Free()


@pytest.mark.mpi(max_size=1)
def test_handles_of_both_kinds_of_mpi_fill_their_places():
    line = alone().Dup()

    @jax.jit
    def total(x):
        return mpi4jax.allreduce(x, MPI.SUM, comm=line)

    lowered = total.lower(jnp.ones(2)).compiler_ir("stablehlo")
    assert lowered is not None
    module, handles = without_handles(lowered)
    assert set(handles.values()) >= {MPI._handleof(line), MPI._handleof(MPI.SUM)}
    text = str(module)
    assert all(text.count(str(place)) == 1 for place in handles)
    assert not any(str(handle) in text for handle in handles.values())
    program = text.encode()
    # Addresses with Open MPI; MPICH's numbers are negative where their first bit is set.
    for own in (handles, dict(zip(handles, (-2080374784, 0x58000003, 0x4C00080B), strict=True))):
        filled = with_handles(program, own).decode()
        assert len(filled) == len(text)
        for handle in own.values():
            assert f"= {handle:019d} : i64" in filled
    line.Free()
    place = next(iter(handles))
    for broken in (program.replace(b"comm = 9", b"comm = 8"), program + str(place).encode()):
        with pytest.raises(UnknownCallError):
            with_handles(broken, handles)
    with pytest.raises(UnknownCallError, match="too long"):
        with_handles(program, dict.fromkeys(handles, 10**20))


@pytest.mark.mpi(max_size=1)
def test_damaged_files_are_replaced(tmp_path):
    files = ProgramFiles(tmp_path)
    files.put("a", b"program")
    assert files.get("a") == b"program" and files.get("b") is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert files.get("a") is None
    files.put("a", b"program")
    assert files.get("a") == b"program"
    assert oct(path.stat().st_mode & 0o777) == oct(0o600)


@pytest.mark.mpi(max_size=1)
def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, caplog):
    files = ProgramFiles(tmp_path / "nowhere")
    with caplog.at_level("INFO", logger="nodepint_mpi"):
        files.put("a", b"program")
        files.put("b", b"program")
    assert files.get("a") is None
    assert caplog.text.count("compiled programs are not kept") == 1


@pytest.mark.mpi(max_size=1)
def test_the_programs_used_last_stay(tmp_path):
    files = ProgramFiles(tmp_path)
    for place, key in enumerate("abc"):
        files.put(key, bytes(68))  # and 32 of the checksum
        os.utime(tmp_path / f"{key}.program", (place, place))
    files.get("a")
    files.prune(200)
    assert [files.get(key) is not None for key in "abc"] == [True, False, True]


@pytest.mark.mpi(max_size=1)
def test_only_a_folder_of_ones_own_is_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = make_folder("auto")
    assert own is not None and own.parent == tmp_path / "cache" / "nodepint_mpi" / "programs"
    assert oct(own.stat().st_mode & 0o777) == oct(0o700)
    assert make_folder("auto") == own
    (tmp_path / "file").touch()
    with caplog.at_level("INFO", logger="nodepint_mpi"):
        assert make_folder(str(tmp_path / "file")) is None
        assert "Not a directory" in caplog.text
        for folder in (own, own.parent):
            folder.chmod(0o770)
            caplog.clear()
            assert make_folder("auto") is None
            assert "others may write to it" in caplog.text
            folder.chmod(0o700)
    assert make_folder("auto") == own
