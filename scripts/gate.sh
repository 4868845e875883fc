#!/usr/bin/env bash
# Fails where the trainer's step takes more than a bare loop's / 0.95: bash scripts/gate.sh [arguments of overhead.py ...]
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash scripts/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python scripts/bench/overhead.py --threads 1 --pairs 16 --at-least 0.95 "$@"
