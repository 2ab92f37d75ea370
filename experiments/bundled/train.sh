#!/usr/bin/env bash
# Trains the bundled model and exports it: bash experiments/bundled/train.sh OUTPUT STEPS [key=value ...]
set -euo pipefail
output=$1 steps=$2
shift 2
python3 -m jdllm.sft task=sudoku:1,countdown:4 examples=3000000 \
    model=random:bundled tokenizer=bundled output="$output" \
    length=72 response_length=40 batch=2048 seed=0 \
    recipe.steps="$steps" recipe.warmup=500 recipe.learning_rate=1.5e-3 recipe.schedule=cosine \
    recipe.weight_decay=0.05 recipe.beta2=0.98 save_every=1000 log_every=20 "$@"
