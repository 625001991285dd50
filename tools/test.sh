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
# ranks: they run only on 1 rank. If no pytest arguments are given, the tests there are run in parts,
# one for each core at a time, and beside them those that mostly wait (for a failed job to end, for
# SLURM).
# TEST_LIMIT_S is the time each stage with tests may take, default 2400. Every stage runs, whatever
# the others gave; the exit status is 0 if all of them passed.
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
# The stages compile much the same programs: keep those that hold no communicator from one stage to
# the next.
scratch="$(mktemp -d)"
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf -- "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$scratch}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

summary=()
failed=0

# stage NAME COMMAND [ARGUMENT...]
stage() {
    local name="$1" started="$SECONDS" status=0
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" || status=$?
    [ $status != 124 ] || echo "$name: not finished after its time limit"
    if [ $status = 0 ]; then
        summary+=("$(printf 'passed  %5d s  %s' $((SECONDS - started)) "$name")")
    else
        summary+=("$(printf 'FAILED  %5d s  %s (exit status %d)' $((SECONDS - started)) "$name" $status)")
        failed=$((failed + 1))
    fi
}

# Every test is in exactly one part: the last takes what the others do not name. The longest come
# first, so that no core is left with one of them at the end. Those that wait go first when they wake:
# some of them hold us to the 20 s in which a failed job has to end.
on_one_rank() {
    local status=0 named=() path pids=() pid
    local waiting=(tests/jobs tests/cli/test_failures.py tests/test_harness.py)
    local single=(tests/core tests/models tests/bench tests/build tests/rom)
    for path in tests/cli tests/training tests/parallel tests/optimal_control "${single[@]}" "${waiting[@]}"; do
        named+=("--ignore=$path")
    done
    part waiting 0 "${waiting[@]}"
    part commands 5 tests/cli --ignore=tests/cli/test_failures.py
    part parallel 5 tests/parallel
    part training 5 tests/training
    part control 5 tests/optimal_control
    part single 5 "${single[@]}"
    part others 5 "${named[@]}"
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    cat "$scratch"/{waiting,commands,parallel,training,control,single,others}.log
    return $status
}

# part NAME NICENESS PYTEST_ARGUMENT...: starts when a core is free, or only those that wait are
# there; what it prints is shown when all is done
part() {
    local log="$scratch/$1.log" niceness="$2"
    shift 2
    while [ "$(jobs -rp | wc -l)" -gt "$(nproc)" ]; do sleep 1; done
    nice -n "$niceness" timeout -k 10 "$limit_s" python -m pytest -rs --durations=8 "$@" </dev/null >"$log" 2>&1 &
    pids+=($!)
}

if [ $static = yes ]; then
    stage format ruff format --check
    stage lint ruff check
    stage types basedpyright
    stage layers python tools/layers.py
    stage docs tools/docs.sh
fi
for n in ${ranks[@]+"${ranks[@]}"}; do
    if [ "$n" = 1 ] && [ $# = 0 ]; then
        stage "tests on 1 rank" on_one_rank
    elif [ "$n" = 1 ]; then
        stage "tests on 1 rank" timeout -k 10 "$limit_s" python -m pytest -rs --durations=8 "$@" </dev/null
    else
        stage "tests on $n ranks" run_ranks "$n" "$limit_s" python -m mpi4py -m pytest -rs --durations=8 \
            --ignore=tests/cli --ignore=tests/jobs --ignore=tests/core --ignore=tests/models "$@"
    fi
done

printf '\n=== summary\n'
printf '%s\n' "${summary[@]}"
if [ $failed -gt 0 ]; then
    echo "$failed of ${#summary[@]} stages failed"
    exit 1
fi
echo "all ${#summary[@]} stages passed in $SECONDS s"
