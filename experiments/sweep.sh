#!/usr/bin/env bash
# The runs behind the published tables (98; some 30 hours on two cores), two at a
# time. Interrupt it as you like: started again, it goes on. (The published slow, stitched-slow,
# stitched-no-kl, all, step, format, L4-more-ppo and L20-ppo began from agents trained again.)
#
#     bash experiments/sweep.sh runs
#     python experiments/tables.py runs/L4*-seed-? --plot assets/scaling.png
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs}
export out OMP_NUM_THREADS=1
mkdir -p "$out"
far="--eval-objectives 1 2 4 8 16 32 64"
imitate="--demos oracle --ppo-steps 0 $far --agents"
from_demos="--agents mem1 --start $out/L4-seed-SEED"

runs() {  # seeds|name|script|flags below; printed: name-seed-N|script|flags
    while IFS="|" read -r seeds name script flags; do
        for seed in $(fold -w1 <<< "$seeds"); do
            echo "$name-seed-$seed|$script|--seed $seed ${flags//SEED/$seed}"
        done
    done <<END
01234|L4|train.py|--agents mem1
0|L4-oracle|train.py|$imitate mem1 full full-list
1234|L4-full|train.py|$imitate full
0|L4-ppo|train.py|--agents full --start $out/L4-oracle-seed-0
1234|L4-ppo|train.py|--agents full --start $out/L4-full-seed-SEED
1234|L4-oracle|train.py|$imitate mem1 full-list
012|L0-oracle|train.py|$imitate mem1 full full-list --around 0
012|L20-oracle|train.py|$imitate mem1 full --around 20
012|stitched|experiments/layouts.py --train stitched|$from_demos
012|released|experiments/layouts.py --train released|$from_demos
012|stitched-slow|experiments/layouts.py --train stitched|$from_demos --ppo-lr 1e-4 --ppo-steps 120
01|stitched-no-kl|experiments/layouts.py --train stitched|$from_demos --ppo-lr 1e-4 --ppo-steps 120 --kl-coef 0
012|slow|train.py|$from_demos --ppo-lr 1e-4 --ppo-steps 120
012|L20|train.py|--agents mem1 --around 20
01234|short|train.py|$imitate mem1 full --primer-longest 6
012|short-L2|train.py|$imitate mem1 full --around 2 --primer-longest 4
012|short-random|train.py|--agents mem1 --primer-longest 6
012|L0|train.py|--agents mem1 --around 0
012|count|train.py|--agents mem1 --env count --demos oracle --demos-steps 1600 --long-prompts 0.3 $far
012|L20-list|train.py|$imitate full-list --around 20
012|L8-oracle|train.py|$imitate mem1 full full-list --around 8
012|L2-oracle|train.py|$imitate mem1 full full-list --around 2
012|shop|train.py|--env shop --around 0 --objectives 1 6
012|all|experiments/rewards.py --reward all|$from_demos
0|step|experiments/rewards.py --reward step|$from_demos
0|format|experiments/rewards.py --reward format|$from_demos
012|window|train.py|--agents window similar --ppo-steps 0
012|full-2x|train.py|--agents full --n-embd 136 --ppo-steps 0
012|L8|train.py|--agents mem1 --around 8
012|L2|train.py|--agents mem1 --around 2
012|L20-ppo|train.py|--agents mem1 full --demos oracle --around 20 --start $out/L20-oracle-seed-SEED
012|L20-list-ppo|train.py|--agents full-list --around 20 --start $out/L20-list-seed-SEED
012|L4-more-ppo|train.py|--agents mem1 full-list --demos oracle --start $out/L4-oracle-seed-SEED
0|web|train.py|--env web
END
}

left() {
    runs | while IFS="|" read -r name script flags; do
        [ -f "$out/$name/results.json" ] || echo "$name|$script|$flags"
    done
}

train() {  # name|script|flags
    IFS="|" read -r name script flags <<< "$1"
    if [ -f "$out/$name/checkpoint.pt" ]; then
        python $script --out "$out/$name" --resume
    else
        python $script --out "$out/$name" --nproc 1 --eval-objectives 1 2 4 8 16 32 --eval-episodes 256 $flags
    fi >> "$out/$name.log" 2>&1
}
export -f train

echo "$(left | wc -l) of $(runs | wc -l) runs left; logs: $out/*.log"
left | xargs -r -P 2 -d "\n" -n 1 bash -c 'train "$1"' sweep
