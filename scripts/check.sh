#!/usr/bin/env bash
# Lint, format and types: bash scripts/check.sh
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash scripts/setup.sh
export PATH=$root/.venv/bin:$PATH
failed=0
for command in "ruff check ." "ruff format --check ." "mypy"; do
    echo "check: $command"
    $command || failed=1
done
exit "$failed"
