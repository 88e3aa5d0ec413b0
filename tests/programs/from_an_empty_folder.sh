#!/usr/bin/env bash
# An installed packtrain, without a checkout: what README's first minutes say. Argument: the program.
set -euo pipefail
packtrain=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export PACKTRAIN_CACHE="$folder/cache"
"$packtrain" init mine
test -s mine.yaml -a -s recipe.schema.json
"$packtrain" keys batching > keys.txt
grep -q examples_per_step keys.txt
"$packtrain" plan quickstart --all --memory 8GiB > plan.txt
grep -q balanced plan.txt
"$packtrain" show quickstart --documents 1 > batch.txt
"$packtrain" train quickstart --set num_rows=600 --set eval_size=50 --set output_dir=out/quickstart
test -s out/quickstart/summary.json
"$packtrain" train quickstart --set num_rows=600 --set eval_size=50 --set output_dir=out/quickstart --resume
"$packtrain" train classification --set num_rows=400 --set eval_size=50 --set max_steps=4
"$packtrain" train quickstart --launch cpu --set use_cpu=true --set num_rows=200 --set eval_size=20 \
    --set max_steps=2 --set output_dir=out/ranks
"$packtrain" compare quickstart --set 'variants=[pad_longest, balanced]' --set num_rows=300 --set eval_size=30 \
    --set num_train_epochs=1 --set 'seeds=[0]' --set repeats=1 --set warmup_steps=1 --set measure_steps=2 --out out/compared
test -s out/compared/summary.md
echo "from an empty folder: all commands ran"
