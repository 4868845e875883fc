#!/usr/bin/env bash
# Set up, then run the whole test suite: bash scripts/test.sh [arguments of pytest ...]
# For example: bash scripts/test.sh tests/models, bash scripts/test.sh -m "not slow"
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash scripts/setup.sh
export PATH=$root/.venv/bin:$PATH OMP_NUM_THREADS=1
# One worker more than cores: many tests wait for processes, time limits or servers.
[ $# -gt 0 ] || set -- -n 3 --dist worksteal -q --durations=25 --durations-min=5
exec python -m pytest "$@"
