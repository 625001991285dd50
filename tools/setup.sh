#!/usr/bin/env bash
# Set up .venv: everything nodepint_mpi needs, with h5py and mpi4jax built against this MPI.
#
#   tools/setup.sh              as often as you like: what is in place is left alone
#   tools/setup.sh --again      also where all seems in place, when nodepint doctor says so
#
# As root on Debian it installs what is missing; elsewhere, a cluster say, load the modules of an
# MPI and of a parallel HDF5 first, and it uses those. These variables choose by hand:
#   PYTHON     a Python 3.11 or newer
#   MPICC      the MPI compiler, default mpicc
#   HDF5_DIR   the prefix of an HDF5 that was built with MPI
# With CI=true it also installs a SLURM, for the tests that need one (tools/slurm_cluster.py).
# Builds are kept in ${XDG_CACHE_HOME:-~/.cache}/nodepint_mpi/wheels, one folder for each MPI,
# HDF5 and Python, so no build is made twice.
set -euo pipefail
# shellcheck source=tools/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

again=no
case "${1:-}" in
'') ;;
--again) again=yes ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' tools/setup.sh
    [ "$1" = --help ] || [ "$1" = -h ]
    exit
    ;;
esac

VENV="$ROOT/.venv"
STAMP="$VENV/.nodepint-stamp"
UNFINISHED="$VENV/.nodepint-unfinished"
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/nodepint_mpi"

say() { printf '[setup %3d s] %s\n' "$SECONDS" "$*"; }

# die MISSING WHAT_TO_TYPE
die() {
    printf 'tools/setup.sh: %s: %s, then run tools/setup.sh again.\n' "$1" "$2" >&2
    exit 1
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_updated=no
apt_install() {
    say "installing Debian packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    if [ "$apt_updated" = no ]; then
        apt-get update -qq >/dev/null
        apt_updated=yes
    fi
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    hash -r
}

# ---- Finding ------------------------------------------------------------------------------

# The interpreter behind a name, never one of a virtual environment or a version-manager shim.
base_python() {
    "$1" -c 'import os, sys
assert sys.version_info >= (3, 11)
print(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))' 2>/dev/null
}

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        base_python "$PYTHON"
        return
    fi
    # 3.11 first: the lock file is tested with it.
    for name in python3.11 python3.12 python3.13 python3.14 python3; do
        base_python "$name" && return
    done
    return 1
}

python_lacks() {
    "$1" - <<'PY'
import importlib.util, os, sysconfig
lacks = []
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    lacks.append("dev")
if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
    lacks.append("venv")
print(*lacks)
PY
}

config_header() { find -L "$1/include" -maxdepth 2 -name 'H5pubconf*.h' 2>/dev/null; }

is_parallel_hdf5() {
    local headers
    headers="$(config_header "$1")"
    # shellcheck disable=SC2086
    [ -n "$headers" ] && grep -qE '^#define H5_HAVE_PARALLEL 1' $headers
}

find_hdf5() {
    local dir vendor="$1" multiarch
    multiarch="$(gcc -print-multiarch 2>/dev/null || true)"
    for dir in "${HDF5_ROOT:-}" "$(dirname -- "$(dirname -- "$(command -v h5pcc || echo /none/none/none)")")" \
        "/usr/lib/${multiarch:-none}/hdf5/$vendor"; do
        if [ -n "$dir" ] && is_parallel_hdf5 "$dir"; then
            echo "$dir"
            return
        fi
    done
    return 1
}

# The libmpi that programs made by the compiler load, by making one.
linked_libmpi() {
    local dir="$1"
    printf '%s\n' '#include <mpi.h>' 'int main(void) { return MPI_Init(0, 0); }' >"$dir/probe.c"
    "$MPICC" "$dir/probe.c" -o "$dir/probe" >"$dir/probe.log" 2>&1 && [ -x "$dir/probe" ] || return 1
    ldd "$dir/probe" | awk '$1 ~ /^libmpi(ch|abi|_[a-z0-9_]+)?\.so/ && $3 ~ /^\// {print $3; exit}'
}

# ---- What is there ------------------------------------------------------------------------

umask 022
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM HUP

if ! python="$(find_python)"; then
    if [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is not a Python 3.11 or newer" "set PYTHON to one that is"
    fi
    can_apt && apt_install python3 python3-dev python3-venv
    python="$(find_python)" || die "no Python 3.11 or newer was found" \
        "load a module of one or set PYTHON=/path/to/python3.11"
fi
lacks="$(python_lacks "$python")"
if [ -n "$lacks" ] && can_apt && [[ "$python" == /usr/bin/* ]]; then
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    # shellcheck disable=SC2046,SC2086
    apt_install $(printf "python$version-%s " $lacks)
    lacks="$(python_lacks "$python")"
fi
case "$lacks" in
*dev*) die "$python has no C headers (Python.h)" \
    "install them (Debian: apt-get install python3-dev) or set PYTHON to another Python" ;;
*venv*) die "$python has no venv and ensurepip" \
    "install them (Debian: apt-get install python3-venv) or set PYTHON to another Python" ;;
esac

MPICC="${MPICC:-mpicc}"
missing=()
command -v gcc >/dev/null || command -v "${CC:-cc}" >/dev/null || missing+=(gcc)
command -v "${CXX:-g++}" >/dev/null || missing+=(g++)
if [ "$MPICC" = mpicc ]; then
    command -v mpicc >/dev/null || missing+=(libopenmpi-dev)
    command -v mpirun >/dev/null || command -v srun >/dev/null || missing+=(openmpi-bin)
fi
if [ ${#missing[@]} -gt 0 ] && can_apt; then
    [ -n "${HDF5_DIR:-}" ] || find_hdf5 openmpi >/dev/null || missing+=(libhdf5-openmpi-dev)
    apt_install "${missing[@]}"
fi
# After MPI: an srun would be taken for a way to start ranks.
if [ "${CI:-}" = true ] && can_apt && ! command -v slurmctld >/dev/null; then
    apt_install slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins
fi
command -v "$MPICC" >/dev/null || die "no MPI compiler ($MPICC) was found" \
    "load an MPI module (such as 'module load openmpi'), set MPICC=/path/to/mpicc, or on Debian type 'apt-get install openmpi-bin libopenmpi-dev libhdf5-openmpi-dev' as root"
command -v "${CXX:-g++}" >/dev/null || die "no C++ compiler (${CXX:-g++}) was found" \
    "load a compiler module, set CXX, or on Debian type 'apt-get install g++' as root"
MPICC="$(command -v "$MPICC")"

libmpi="$(linked_libmpi "$scratch")" || {
    cat "$scratch/probe.log" >&2
    die "$MPICC cannot compile an MPI program (its output is above)" "fix that or set MPICC to another one"
}
[ -n "$libmpi" ] || die "programs made by $MPICC find no shared libmpi" \
    "add its folder to LD_LIBRARY_PATH (loading the MPI's module does that)"
libmpi="$(readlink -f "$libmpi")"

if "$MPICC" --showme:version >/dev/null 2>&1; then vendor=openmpi; else vendor=mpich; fi
if [ -n "${HDF5_DIR:-}" ]; then
    is_parallel_hdf5 "$HDF5_DIR" || die "HDF5_DIR=$HDF5_DIR is not an HDF5 that was built with MPI (no 'H5_HAVE_PARALLEL 1' in a H5pubconf.h under its include/)" \
        "set HDF5_DIR to the prefix of a parallel HDF5"
elif ! HDF5_DIR="$(find_hdf5 "$vendor")"; then
    if can_apt && [[ "$MPICC" == /usr/bin/* ]]; then
        apt_install "libhdf5-$vendor-dev"
    fi
    HDF5_DIR="$(find_hdf5 "$vendor")" || die "no parallel HDF5 was found" \
        "load the module of an HDF5 built with this MPI and set HDF5_DIR to its prefix (Debian: apt-get install libhdf5-$vendor-dev)"
fi
# shellcheck disable=SC2046
hdf5_version="$(sed -n 's/^#define H5_PACKAGE_VERSION "\(.*\)"/\1/p' $(config_header "$HDF5_DIR") | head -n 1)"

# With a GPU mpi4jax is to find CUDA; without one a compiler on the PATH would only confuse it.
cuda=no
if command -v nvcc >/dev/null && nvidia-smi -L 2>/dev/null | grep -q .; then cuda=yes; fi

# ---- Is it done already? ------------------------------------------------------------------

# Everything a build of h5py or mpi4jax depends on.
build_key() {
    echo "recipe 1"
    "$python" -c 'import sys, sysconfig; print(sys.version, sysconfig.get_platform())'
    echo "$MPICC" "$libmpi" "$(stat -L -c '%s %Y' "$libmpi")"
    "$MPICC" --showme:version 2>&1 || "$MPICC" -show 2>&1 || true
    "$MPICC" --version 2>&1 | head -n 1
    echo "$HDF5_DIR $hdf5_version cuda=$cuda"
    cat requirements-mpi.lock
    grep -E '^(cython|jax|jaxlib|mpi4py|nanobind|numpy|pkgconfig|setuptools|wheel)==' requirements.lock
}
key="$(build_key | sha256sum | cut -c 1-16)"

# What a finished set-up looks like, with the two builds as they are installed now: another h5py
# put over ours does not go unnoticed.
print_stamp() {
    echo "$key $python $ROOT"
    cat requirements.lock pyproject.toml \
        "$VENV"/lib/python*/site-packages/{h5py,mpi4jax}-*.dist-info/RECORD 2>/dev/null | sha256sum
}

is_done() {
    [ ! -e "$UNFINISHED" ] && [ -e "$STAMP" ] && [ "$(print_stamp || true)" = "$(cat "$STAMP")" ] &&
        "$VENV/bin/python" -c '' 2>/dev/null
}

if [ $again = no ] && is_done; then
    say "everything is in place (nodepint doctor checks it)"
    exit 0
fi

# One set-up of this clone at a time, and one build of each kind on this machine. Where a file
# system has no locks, the worst case is a build made twice.
with_lock() {
    if command -v flock >/dev/null; then
        exec {lock_fd}<"$1"
        flock -w 1800 "$lock_fd" || say "no lock on $1; going on without"
    fi
}
with_lock "$ROOT"
if [ $again = no ] && is_done; then
    say "another set-up has just finished"
    exit 0
fi

say "Python $("$python" -c 'import platform; print(platform.python_version())') ($python)"
say "MPI $libmpi ($MPICC), HDF5 $hdf5_version ($HDF5_DIR)$([ $cuda = no ] || echo ', CUDA')"

# ---- The environment ----------------------------------------------------------------------

usable_venv() {
    [ ! -e "$UNFINISHED" ] && [ "$(base_python "$VENV/bin/python")" = "$python" ] &&
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}
if ! usable_venv; then
    say "making .venv"
    "$python" -m venv --clear "$VENV"
fi
touch "$UNFINISHED"
rm -f "$STAMP"

# uv comes from the same lock file, through pip and the user's own pip settings. It does not
# read those itself, so a mirror set for pip is handed on.
uv="$VENV/bin/uv"
awk '/^uv==/ {on = 1} on {print} on && !/\\$/ {exit}' requirements.lock >"$scratch/uv.lock"
if [ "$("$uv" --version 2>/dev/null | awk '{print $2}')" != "$(sed -n '1s/^uv==\([^ ]*\).*/\1/p' "$scratch/uv.lock")" ]; then
    say "installing uv"
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
        --only-binary :all: -r "$scratch/uv.lock" ||
        die "uv could not be installed (the reason is above)" "fix pip's settings (on a cluster: run this on a node with a network)"
fi
mirror="$("$VENV/bin/python" -m pip config get global.index-url 2>/dev/null || echo "${PIP_INDEX_URL:-}")"
if [ -n "$mirror" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="$mirror"
fi
export VIRTUAL_ENV="$VENV"

say "installing the locked packages"
"$uv" pip install -q --require-hashes --only-binary :all: -r requirements.lock ||
    die "the locked packages could not be installed (the reason is above)" "fix that"

# mpi4py's wheel looks here first, so it takes the library that the builds below are linked to,
# whatever else a search path may offer.
ln -sfn "$libmpi" "$VENV/lib/libmpi.so"

# ---- h5py and mpi4jax ---------------------------------------------------------------------

wheels="$CACHE/wheels/$key"

# build NAME: a wheel of that pinned package into a folder of its own.
build() {
    local name="$1" started="$SECONDS" log="$scratch/$1.log"
    say "building $name against this MPI (one or two minutes, once for each MPI)"
    awk -v name="$name" '$0 ~ "^" name "==" {on = 1} on {print} on && !/\\$/ {exit}' \
        requirements-mpi.lock >"$scratch/$name.lock"
    # pip's own cache does not know which MPI a wheel was built against: --no-cache-dir.
    "$VENV/bin/python" -m pip wheel --disable-pip-version-check --no-cache-dir --no-deps \
        --no-build-isolation --no-binary :all: --require-hashes -w "$scratch/wheels" \
        -r "$scratch/$name.lock" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        die "$name could not be built against $MPICC and $HDF5_DIR (its last words are above)" "fix that"
    }
    say "built $name in $((SECONDS - started)) s"
}

build_all() (
    export PATH="$VENV/bin:$PATH" CC="$MPICC" MPICC HDF5_MPI=ON HDF5_DIR H5PY_SETUP_REQUIRES=0
    export CFLAGS="-O1 -g0" DIST_EXTRA_CONFIG="$scratch/build.cfg"
    printf '[build_ext]\nparallel = %s\n' "$(nproc)" >"$DIST_EXTRA_CONFIG"
    mkdir "$scratch/wheels"
    build h5py
    unset CFLAGS
    if [ $cuda = no ]; then
        mkdir "$scratch/no-cuda"
        export CUDA_PATH="$scratch/no-cuda" CUDA_ROOT="$scratch/no-cuda"
    fi
    build mpi4jax
    # A folder appears in the cache whole or not at all.
    local publish
    publish="$(mktemp -d "$CACHE/wheels/.new.XXXXXX")"
    cp "$scratch"/wheels/*.whl "$publish"
    chmod 755 "$publish"
    mv -T "$publish" "$wheels" 2>/dev/null || rm -rf "$publish"
)

mkdir -p "$CACHE/wheels"
if [ ! -d "$wheels" ]; then
    touch "$CACHE/wheels/$key.lock"
    with_lock "$CACHE/wheels/$key.lock"
fi
if [ ! -d "$wheels" ]; then
    build_all
else
    say "h5py and mpi4jax were built before"
fi
"$uv" pip install -q --no-index --no-deps --reinstall "$wheels"/*.whl

say "installing nodepint_mpi itself"
"$uv" pip install -q --no-index --no-deps --no-build-isolation -e .

# Where PYTHONDONTWRITEBYTECODE is set, or the environment is read-only on compute nodes, every
# process would else compile what it imports: 13.6 s instead of 4.5 s on each rank. A quarter of
# it all is the packages' own tests, which nobody imports.
say "compiling the packages' bytecode"
"$VENV/bin/python" -m compileall -q -j 0 -x 'site-packages/.*/tests?/' \
    "$VENV"/lib/python*/site-packages >/dev/null 2>&1 || true

rm -f "$UNFINISHED"

say "checking with nodepint doctor"
"$VENV/bin/nodepint" doctor || die "nodepint doctor found something wrong" "do what it says"
print_stamp >"$STAMP"
say "done; type '. .venv/bin/activate' to have the nodepint command"
