#!/usr/bin/env bash
# Check everything: set-up if needed, format, lint, types, import layers, documentation, and all
# tests on 1, 2, 3 and 4 ranks.
#
#   tools/test.sh [static] [RANKS...] [-- PYTEST_ARGUMENT...]
#
#   tools/test.sh                          all of it (the same as: static 1 2 3 4)
#   tools/test.sh static                   only format, lint, types, layers and documentation
#   tools/test.sh 2 3 -- tests/parallel    only those tests, on 2 and on 3 ranks
#   tools/test.sh 1 -- -k adjoint -x       any pytest arguments
#
# Tests in tests/cli and tests/jobs start jobs of their own; tests/core and tests/models know no
# ranks: they run only on 1 rank. If no pytest arguments are given, the tests on 1 rank are run in
# parts, one for each core at a time, and beside them those that mostly wait (for a failed job to
# end, for SLURM); what they print is shown when all are done.
# TEST_LIMIT_S is the time each part and each number of ranks may take, default 2400. Every stage
# runs, whatever the others gave; the exit status is 0 if all of them passed.
set -euo pipefail
# shellcheck source=tools/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

static=no
ranks=()
while [ $# -gt 0 ]; do
    case "$1" in
    --)
        shift
        break
        ;;
    static) static=yes ;;
    [1-9] | [1-9][0-9]) ranks+=("$1") ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' tools/test.sh
        exit 0
        ;;
    *)
        echo "tools/test.sh: '$1' is no number of ranks; pytest's own arguments come after --" >&2
        exit 2
        ;;
    esac
    shift
done
if [ $static = no ] && [ ${#ranks[@]} = 0 ]; then
    ranks=(1 2 3 4)
    [ $# -gt 0 ] || static=yes
fi
limit_s="${TEST_LIMIT_S:-2400}"

tools/setup.sh

n_cores="$(nproc)" # before the variable below, which nproc would take for an answer
# Several ranks on a few cores: one thread each for the libraries that would take all cores, and a
# rank that waits lets another one work (4 ranks on 2 cores: 1.6 s, else more than a minute).
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
export OMPI_MCA_mpi_yield_when_idle=1
# Most of the time goes into compiling programs that then run for milliseconds.
export JAX_DISABLE_MOST_OPTIMIZATIONS=1
# Nor do they need the lines of Python that they come from: a twentieth of the time.
export JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0
# XLA's older way of emitting loops compiles twice as fast (a gradient through diffrax: 0.9 s instead
# of 2.0 s, an eager operation 15 ms instead of 27 ms), but recurses: thousands of operations that
# XLA fuses into one end it by a segmentation fault. A newer jaxlib that has lost it says so and ends.
# And kernels are compiled as one module instead of many in parallel: a seventh of XLA's time.
# The test of jobs/smoke.sbatch runs as users do, without these and the line above.
XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_cpu_use_fusion_emitters=false"
export XLA_FLAGS="$XLA_FLAGS --xla_cpu_parallel_codegen_split_count=1"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" MPLBACKEND=Agg HF_HUB_OFFLINE=1
# The stages compile much the same programs, and most tests make communicators of their own: keep what
# is compiled from one to the next, also what sends messages (tests/conftest.py).
scratch="$(mktemp -d)"
# A job is a shell, which ends when the command does that it waits for.
trap 'for pid in $(jobs -p); do pkill -P "$pid" || true; done; rm -rf -- "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$scratch}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

summary=()
failed=0

# record NAME STATUS SECONDS: a line of the summary
record() {
    [ "$2" != 124 ] || echo "$1: not finished after its time limit"
    if [ "$2" = 0 ]; then
        summary+=("$(printf 'passed  %5d s  %s' "$3" "$1")")
    else
        summary+=("$(printf 'FAILED  %5d s  %s (exit status %d)' "$3" "$1" "$2")")
        failed=$((failed + 1))
    fi
}

# stage NAME COMMAND [ARGUMENT...]
stage() {
    local name="$1" started="$SECONDS" status=0
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" || status=$?
    record "$name" "$status" $((SECONDS - started))
}

one_rank() { timeout -k 10 "$limit_s" python -m pytest -rs --durations=8 "$@" </dev/null; }

# several_ranks N [PYTEST_ARGUMENT...]
several_ranks() {
    local n="$1"
    shift
    run_ranks "$n" "$limit_s" python -m mpi4py -m pytest -rs --durations=8 \
        --ignore=tests/cli --ignore=tests/jobs --ignore=tests/core --ignore=tests/models "$@"
}

# Every test is in exactly one part: the last takes what the others do not name. The longest come
# first, so that no core is left with one of them at the end.
waiting=(tests/jobs tests/cli/test_failures.py tests/test_harness.py)
single=(tests/core tests/models tests/bench tests/build tests/rom)
parts=(commands parallel control training single others)
part() {
    local named=() path
    case "$1" in
    waiting) one_rank "${waiting[@]}" ;;
    commands) one_rank tests/cli --ignore=tests/cli/test_failures.py ;;
    parallel) one_rank tests/parallel ;;
    training) one_rank tests/training ;;
    control) one_rank tests/optimal_control ;;
    single) one_rank "${single[@]}" ;;
    others)
        for path in tests/{cli,parallel,training,optimal_control} "${single[@]}" "${waiting[@]}"; do
            named+=("--ignore=$path")
        done
        one_rank "${named[@]}"
        ;;
    esac
}

# job NAME NICENESS COMMAND [ARGUMENT...]: in the background; what it prints, its status and the
# time when it ended are kept
declare -A pids started
job() {
    local name="$1" niceness="$2"
    shift 2
    started[$name]="$SECONDS"
    (
        trap - EXIT
        trap : TERM # it may get that too, as one of its group; it has to be found by the trap above
        renice -n "$niceness" -p "$BASHPID" >/dev/null 2>&1 || true
        status=0
        "$@" || status=$?
        echo "$status $SECONDS" >"$scratch/$name.end"
    ) >"$scratch/$name.log" 2>&1 &
    pids[$name]=$!
}

# n_running NAME...: how many of these jobs
n_running() {
    local name count=0
    for name in "$@"; do
        if [ -n "${pids[$name]:-}" ] && kill -0 "${pids[$name]}" 2>/dev/null; then count=$((count + 1)); fi
    done
    echo $count
}

# finished STAGE NAME...: the output of these jobs, and the first bad one of their statuses
finished() {
    local stage="$1" name status=0 first="${started[$2]}" last=0 end at
    shift
    printf '\n=== %s\n' "$stage"
    for name in "$@"; do
        cat "$scratch/$name.log"
        # One that was killed has left no status.
        read -r end at <"$scratch/$name.end" || { end=137 at="$SECONDS"; } 2>/dev/null
        printf '%s: exit status %d after %d s\n' "$name" "$end" $((at - started[$name]))
        [ "$status" != 0 ] || status="$end"
        [ "$at" -le "$last" ] || last="$at"
    done
    record "$stage" "$status" $((last - first))
}

# in_parts: the parts, as many at a time as there are cores, and beside them those tests that wait.
# These go first when they wake.
in_parts() {
    local next=0
    job waiting 0 part waiting
    while :; do
        while [ $next -lt ${#parts[@]} ] && [ "$(n_running "${parts[@]}")" -lt "$n_cores" ]; do
            job "${parts[next]}" 5 part "${parts[next]}"
            next=$((next + 1))
        done
        [ "$(n_running waiting "${parts[@]}")" != 0 ] || break
        sleep 1
    done
    finished "tests on 1 rank" waiting "${parts[@]}"
}

if [ $static = yes ]; then
    stage format ruff format --check
    stage lint ruff check
    stage layers python tools/layers.py
    job types 0 basedpyright
    job docs 0 tools/docs.sh
fi
for n in ${ranks[@]+"${ranks[@]}"}; do
    if [ "$n" = 1 ] && [ $# = 0 ]; then
        in_parts
    elif [ "$n" = 1 ]; then
        stage "tests on 1 rank" one_rank "$@"
    else
        stage "tests on $n ranks" several_ranks "$n" "$@"
    fi
done
if [ $static = yes ]; then
    wait "${pids[types]}" "${pids[docs]}" || true
    finished types types
    finished docs docs
fi

printf '\n=== summary\n'
printf '%s\n' "${summary[@]}"
if [ $failed -gt 0 ]; then
    echo "$failed of ${#summary[@]} stages failed"
    exit 1
fi
echo "all ${#summary[@]} stages passed in $SECONDS s"
