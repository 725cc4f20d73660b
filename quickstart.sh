#!/usr/bin/env bash
# Draw people, train a small model on them, evaluate it and search: a few minutes on two CPU cores. The results are
# models/first-steps, index/first-steps.pt and ranking.png; a second run replaces them.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf models/first-steps runs/first-steps

python data_prep.py --synthetic

# Small images and few epochs, starting from the default model. `python train.py` alone is the full recipe on Market-1501.
python train.py --exp_name first-steps --data_root data/synthetic --weights models/masked-hog-908/best.pth \
  --height 128 --width 64 --batch_size 32 --lr 0.02 --num_epochs 8 --warmup_epochs 1

python eval.py --exp_name first-steps --data_root data/synthetic --save_index

python inference.py --exp_name first-steps --data_root data/synthetic --load_index --topk 10 --output ranking.png \
  --query_paths data/synthetic/query/{0041/*_c4*,0044/*_c1*,0045/*_c1*,0042/*_c3*}
