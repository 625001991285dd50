# shellcheck shell=bash
# Sourced, by bash, by the scripts of this folder and of jobs/. It sets
#   ROOT         the repository's root
#   PATH         .venv first, and the folder of MPICC if that variable names an MPI compiler
#   mpi_vendor   prints openmpi, mpich or none: what mpirun belongs to
#   run_ranks    runs a command on N ranks of this machine, with a hard time limit

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

case "${MPICC:-}" in
/*) PATH="$(dirname -- "$MPICC"):$PATH" ;;
esac
PATH="$ROOT/.venv/bin:$PATH"
export PATH ROOT

# Open MPI refuses to run as root (a container, a CI machine) unless it is told twice.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

mpi_vendor() {
    case "$(mpirun --version 2>/dev/null </dev/null | head -n 3)" in
    *"Open MPI"* | *OpenRTE*) echo openmpi ;;
    *HYDRA* | *Intel* | *MPICH*) echo mpich ;;
    *) echo none ;;
    esac
}

# run_ranks N LIMIT_S COMMAND [ARG...]
#
# One core for each rank where there are enough; more ranks than cores share them all unbound.
# After LIMIT_S seconds all ranks are ended and the status is not zero. Reads no standard input.
run_ranks() {
    local n="$1" limit_s="$2" cores
    shift 2
    cores="$(nproc)"
    case "$(mpi_vendor)" in
    openmpi)
        local options=(-n "$n" --timeout "$limit_s")
        if [ "$n" -gt "$cores" ]; then
            options+=(--oversubscribe --bind-to none)
        else
            options+=(--bind-to core)
        fi
        # The outer limit is for an mpirun that is stuck itself.
        timeout -k 10 "$((limit_s + 20))" mpirun "${options[@]}" "$@" </dev/null
        ;;
    mpich)
        timeout -k 10 "$limit_s" mpirun -n "$n" "$@" </dev/null
        ;;
    *)
        echo "run_ranks: no working mpirun on the PATH: load an MPI module," \
            "or run tools/setup.sh as root on Debian." >&2
        return 127
        ;;
    esac
}
