#!/usr/bin/env bash
# Write requirements.lock and requirements-mpi.lock anew from pyproject.toml.
#
#   tools/lock.sh               keeps the versions that still fit
#   tools/lock.sh --upgrade     takes the newest that fit (other uv options work as well)
#
# Needs a finished .venv. The locks hold versions and hashes and no addresses.
set -euo pipefail
# shellcheck source=tools/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

[ -x .venv/bin/uv ] || {
    echo "tools/lock.sh: there is no .venv yet: run tools/setup.sh first." >&2
    exit 1
}
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
compile=(.venv/bin/uv pip compile -q --generate-hashes --no-annotate --no-header --python-version 3.11)

# What is built here: the same resolution, only those two packages.
[ -f requirements-mpi.lock ] && cat requirements.lock requirements-mpi.lock >"$scratch/all.lock"
"${compile[@]}" --universal pyproject.toml --group dev --group docs --group build "$@" -o "$scratch/all.lock"
awk '/^[a-z]/ {mpi = /^(h5py|mpi4jax)==/} {print > (mpi ? mpi_lock : lock)}' \
    lock="$scratch/requirements.lock" mpi_lock="$scratch/requirements-mpi.all" "$scratch/all.lock"

# Of those two only the source's hash counts: keep the one that the source really has.
H5PY_SETUP_REQUIRES=0 python -m pip download -q --disable-pip-version-check --no-deps \
    --no-build-isolation --no-binary :all: --require-hashes -d "$scratch/source" \
    -r "$scratch/requirements-mpi.all"
for archive in "$scratch"/source/*; do
    name="$(basename "$archive")"
    hash="$(sha256sum "$archive" | cut -d ' ' -f 1)"
    printf '%s \\\n    --hash=sha256:%s\n' "$(grep -oE "^${name%%-*}==[^ ]+" "$scratch/requirements-mpi.all")" "$hash"
done >"$scratch/requirements-mpi.lock"

cp "$scratch/requirements.lock" "$scratch/requirements-mpi.lock" .
grep -c == requirements.lock requirements-mpi.lock
