#!/usr/bin/env bash
# All runs behind the published tables, two at a time. Interrupt it as you like:
# started again, it says how many runs are left, and goes on where it stopped.
#
#     bash experiments/sweep.sh runs
#     python experiments/tables.py runs/*-seed-? --plot assets/scaling.png
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs}
export out OMP_NUM_THREADS=1
mkdir -p "$out"

runs() {
    while read -r seeds name flags; do
        for seed in $(fold -w1 <<< "$seeds"); do
            echo "$name-seed-$seed --seed $seed $(eval echo "$flags")"
        done
    done <<'END'
012  L4          --agents mem1
012  L4-oracle   $imitate
012  L4-ppo      --agents full --start $out/L4-oracle-seed-$seed
34   L4          --agents mem1
34   L4-oracle   $imitate
34   L4-ppo      --agents full --start $out/L4-oracle-seed-$seed
012  L20         --agents mem1 --around 20
012  L20-oracle  $imitate --around 20
012  L0          --agents mem1 --around 0
012  L0-oracle   $imitate --around 0
012  L8-oracle   $imitate --around 8
012  L2-oracle   $imitate --around 2
012  count       --agents mem1 --env count --demos oracle --demos-steps 1600 --long-prompts 0.3 $far
012  shop        --env shop --around 0 --objectives 1 6
012  window      --agents window similar --ppo-steps 0
012  full-2x     --agents full --n-embd 136 --ppo-steps 0
012  L8          --agents mem1 --around 8
012  L2          --agents mem1 --around 2
012  L20-ppo     --agents mem1 full full-list --demos oracle --around 20 --start $out/L20-oracle-seed-$seed
012  L4-more-ppo --agents mem1 full-list --demos oracle --start $out/L4-oracle-seed-$seed
0    web         --env web
END
}
far="--eval-objectives 1 2 4 8 16 32 64"
imitate="--agents mem1 full full-list --demos oracle --ppo-steps 0 $far"

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
