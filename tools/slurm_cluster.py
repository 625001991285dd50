#!/usr/bin/env python3
"""A throwaway SLURM cluster on this machine, for as long as a command runs.

    tools/slurm_cluster.py [--nodes N] COMMAND [ARGUMENT...]

    tools/slurm_cluster.py bash                          a shell in which sbatch and srun work
    tools/slurm_cluster.py --nodes 4 sbatch --wait x.sh

Needs root on Linux, and Debian's packages slurmctld, slurmd, slurm-client, munge and
slurm-wlm-basic-plugins (`CI=true tools/setup.sh` installs them). Everything is in a temporary
folder, without systemd, cgroups or /etc, and COMMAND finds it through SLURM_CONF. When COMMAND
ends, or this script is told to, all jobs are canceled and every process that came out of the
cluster is ended. The exit status is COMMAND's.
"""

import argparse
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
TOLD_TO_STOP = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
UP_WITHIN_S = 60.0
CANCELLED_WITHIN_S = 5.0
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

# Limits a user meets are SLURM's defaults, but waiting is short: for the scheduler, and for a job
# that is queued again, which waits 10 s longer than a credential lives (120 s by default). Nodes
# claim more cores than there are, and two GPUs that are /dev/null and /dev/zero: enough to see what
# a job is given.
CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=pmix
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES MaxTime=60 OverSubscribe=NO
"""


class ClusterError(Exception):
    """The cluster does not come up, or has come down by itself."""


def _returncode(*command: str) -> int:
    return subprocess.run(command, capture_output=True, timeout=30).returncode


def missing() -> list[str]:
    """What keeps this machine from having such a cluster."""
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    if "unshare" not in lacks and _returncode("unshare", "--uts", "true") != 0:
        lacks.append("the right to give every node a host name of its own (root, CAP_SYS_ADMIN)")
    return lacks


class Cluster:
    """The daemons, and all processes that descend from this one."""

    def __init__(self, folder: Path, *, n_nodes: int, cpus: int):
        self.folder = folder
        self.nodes = [f"n{k + 1}" for k in range(n_nodes)]
        self.conf = folder / "slurm.conf"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(self.conf)
        self.daemons: dict[int, str] = {}
        # Python buries those that nobody holds whenever it starts another process.
        self.held: list[subprocess.Popen] = []
        control_port, *ports = _free_ports(1 + n_nodes)
        text = CONF.format(
            folder=folder, host=socket.gethostname().partition(".")[0], control_port=control_port
        )
        for name, port in zip(self.nodes, ports, strict=True):
            text += f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port}"
            text += f" CPUs={cpus} Gres=gpu:2\n"
        self.conf.write_text(text)
        gpus = "".join(f"Name=gpu File=/dev/{name}\n" for name in ("null", "zero"))
        (folder / "gres.conf").write_text(gpus)

    def start(self) -> None:
        """Return when every node is idle."""
        # Whatever a job leaves behind becomes a child of this process, so `stop` finds it.
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise ClusterError(f"prctl: {os.strerror(ctypes.get_errno())}")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.folder.chmod(0o755)  # munged wants its socket to be within everybody's reach
        munge = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "seed", "log")}
        files = [f"--{name}-file={munge[name]}" for name in ("pid", "seed", "log")]
        self._daemon(
            "munged", "--foreground", f"--key-file={key}", f"--socket={munge['socket']}", *files
        )
        self._wait("munged", munge["socket"].exists)
        (self.folder / "state").mkdir()
        self._daemon("slurmctld", "-D", "-f", self.conf)
        self._wait("slurmctld", lambda: "UP" in self._ask("scontrol", "ping"))
        for name in self.nodes:
            (self.folder / name).mkdir()
            # Of ranks with one host name Open MPI believes that they share a session and memory.
            own_name = "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name
            self._daemon(*own_name, "slurmd", "-D", "-N", name, "-f", self.conf, name=name)
        idle = ["idle"] * len(self.nodes)
        self._wait("the nodes", lambda: self._ask("sinfo", "-hNo", "%T").split() == idle)

    def run(self, command: list[str]) -> int:
        """Run a command in the cluster; its exit status."""
        process = subprocess.Popen(command, env=self.environment)
        self.held.append(process)
        while True:
            ended, status = os.wait()  # also buries the orphans of jobs, as init would
            if ended in self.daemons:
                raise self._failure(f"{self.daemons.pop(ended)} has ended by itself")
            if ended == process.pid:
                return os.waitstatus_to_exitcode(status) % 256

    def stop(self) -> None:
        """Cancel all jobs, then end all processes that came out of the cluster."""
        if "slurmctld" in self.daemons.values():
            with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
                # Orderly, so that MPI removes what it has in shared memory.
                self._ask("scancel", *self._ask("squeue", "-ho", "%A").split())
                self._wait(
                    "jobs", lambda: not self._ask("squeue", "-ho", "%A"), limit_s=CANCELLED_WITHIN_S
                )
        while left := _descendants(os.getpid()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0] != 0:
                    pass
            time.sleep(0.01)

    def _daemon(self, *command: object, name: str | None = None) -> None:
        name = name or str(command[0])
        # SIGKILL on this script must not leave them behind either.
        words = "setpriv", "--pdeathsig=KILL", "--", *map(str, command)
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for COMMAND
            )
        self.held.append(process)
        self.daemons[process.pid] = name

    def _ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30
        )
        return done.stdout

    def _wait(self, what: str, ready: Callable[[], bool], *, limit_s: float = UP_WITHIN_S) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            for pid in list(self.daemons):
                if os.waitpid(pid, os.WNOHANG)[0] != 0:
                    raise self._failure(f"{self.daemons.pop(pid)} has ended by itself")
            if time.monotonic() > deadline:
                raise self._failure(f"not within {limit_s:g} s: {what}")
            time.sleep(0.05)

    def _failure(self, reason: str) -> ClusterError:
        logs = [
            f"--- {path.name}\n" + "".join(path.read_text().splitlines(keepends=True)[-15:])
            for path in sorted(self.folder.glob("*.log"))
        ]
        return ClusterError("\n".join([reason, *logs]))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _descendants(ancestor: int) -> list[int]:
    """All processes below one, without itself."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            _, parent = path.read_text().rpartition(")")[2].split()[:2]  # after the name: state
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = children.get(ancestor, [])
    for pid in found:  # which grows
        found += children.get(pid, [])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes [2]")
    parser.add_argument("--cpus", type=int, default=4, help="cores each node claims to have [4]")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    options = parser.parse_args()
    if not options.command:
        parser.error("which COMMAND?")
    if lacks := missing():
        print(f"slurm_cluster.py: this machine lacks {', '.join(lacks)}", file=sys.stderr)
        return 2
    for number in TOLD_TO_STOP:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder), n_nodes=options.nodes, cpus=options.cpus)
        try:
            cluster.start()
            return cluster.run(options.command)
        except ClusterError as error:
            print(f"slurm_cluster.py: {error}", file=sys.stderr)
            return 1
        finally:
            for number in TOLD_TO_STOP:
                signal.signal(number, signal.SIG_IGN)
            cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
