#!/usr/bin/env bash
# Set up if needed, then train a time-parallel Neural ODE of predator and prey on 2 ranks.
# The picture is runs/quickstart/trajectories.png. An existing run is moved aside, never overwritten.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
source tools/env.sh

if [ -e runs/quickstart ]; then
    mv runs/quickstart "runs/quickstart-$(date -r runs/quickstart +%Y%m%d-%H%M%S)"
fi
nodepint data prepare lotka_volterra
run_ranks 2 600 nodepint train configs/quickstart.toml
echo "look at $PWD/runs/quickstart/trajectories.png and loss.png beside it"
