#!/usr/bin/env bash
# Train all agents, three seeds of each, two runs at a time. Interrupt it as you
# like: started again, it says how many runs are left, and goes on where it stopped.
#
#     bash experiments/sweep.sh runs
#     python experiments/tables.py runs/*-seed-? --plot assets/scaling.png
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs}
export out OMP_NUM_THREADS=1
mkdir -p "$out"

runs() {
    while read -r name flags; do
        for seed in 0 1 2; do
            echo "$name-seed-$seed --seed $seed $flags"
        done
    done <<END
mem1      --agents mem1
full      --agents full
full-list --agents full-list
full-2x   --agents full --n-embd 136
oracle    --agents mem1 --demos oracle
others    --agents window similar
END
}

left() {
    runs | while read -r name flags; do
        [ -f "$out/$name/results.json" ] || echo "$name $flags"
    done
}

train() {  # NAME FLAG...
    if [ -f "$out/$1/checkpoint.pt" ]; then
        python train.py --out "$out/$1" --resume
    else
        python train.py --out "$out/$1" --nproc 1 --eval-objectives 1 2 4 8 16 32 --eval-episodes 256 "${@:2}"
    fi >> "$out/$1.log" 2>&1
}
export -f train

echo "$(left | wc -l) of $(runs | wc -l) runs left; what they say is in $out/*.log"
left | xargs -P 2 -L 1 bash -c 'train "$@"' sweep
