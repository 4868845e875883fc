#!/usr/bin/env bash
# From nothing to a translator trained on sharded ranks: bash scripts/quickstart.sh [key=value ...]
# Sets up .venv, checks the packaged corpus, trains experiment=quickstart with ZeRO-2 in bf16 (two ranks on a CPU, every GPU
# if there are any), evaluates on held-out sentences and shows them. A second call re-uses all of it.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash scripts/setup.sh
export PATH=$root/.venv/bin:$PATH

name=quickstart runs_dir=runs
for word in "$@"; do
    case $word in
    name=*) name=${word#name=} ;;
    runs_dir=*) runs_dir=${word#runs_dir=} ;;
    esac
done
run=$runs_dir/$name

corpus=trainer/data/corpora/homeassistant_en_de
if ! (cd "$corpus" && sha256sum --check --quiet SHA256SUMS); then
    printf 'quickstart: %s is damaged.\n            Bring it back: git checkout -- %s, or python scripts/data/homeassistant.py\n' \
        "$corpus" "$corpus" >&2
    exit 1
fi
echo "quickstart: the corpus is whole: $corpus (README.md there says where it is from)"

count_ranks() { # every GPU, as far as the batch divides over them; else two CPU ranks, or one on a single core
    local gpus count
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    for count in 8 4 2 1; do
        if [ "$gpus" -ge "$count" ]; then
            echo "$count"
            return
        fi
    done
    if [ "$(nproc)" -ge 2 ]; then echo 2; else echo 1; fi
}

if grep -qs '"state": "finished"' "$run/status.json"; then
    echo "quickstart: $run is finished and not trained again; delete it, or give name=..., for a new run"
else
    ranks=$(count_ranks)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
    echo "quickstart: training on $ranks rank(s)"
    torchrun --standalone --nproc_per_node="$ranks" -m trainer experiment=quickstart engine=zero2 "$@"
fi
python scripts/report.py "$run"
