#!/usr/bin/env bash
# What to run first on a machine with a GPU, in this order and within an hour. Each step writes a log and a
# JSON into experiments/results/<machine>/, and a step that fails, or takes longer than its share of the hour,
# stops none of the others.
#
#   bash experiments/gpu_first_hour.sh              # on a machine with a GPU
#   bash experiments/gpu_first_hour.sh --dry OUT    # tiny, on a CPU, into OUT: does the script run?
#
# STEP.json has the command, its exit code and its seconds; what a step measures stands in a JSON of its own
# beside it (benchmark-rows.json and so on).
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python}
DRY=
[ "$1" = --dry ] && DRY=yes
if [ $DRY ]; then
    OUT=$2
    GPUS=2                                                  # processes on the CPU
else
    NAME=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name())' 2> /dev/null | tr -cs 'A-Za-z0-9\n' -)
    [ -n "$NAME" ] ||
        { echo "no GPU that PyTorch finds; --dry OUT tries the script on a CPU"; exit 1; }
    OUT=experiments/results/$NAME
    GPUS=$($PYTHON -c 'import torch; print(torch.cuda.device_count())')
fi
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
failed=0

step() {                                                    # step NAME MOST_SECONDS command...
    local name=$1 most=$2
    shift 2
    echo "== $name: $*"
    local start=$SECONDS
    timeout "$most" "$@" > "$OUT/$name.log" 2>&1
    local code=$? spent=$((SECONDS - start))
    tail -n 4 "$OUT/$name.log"
    [ $code = 0 ] || { failed=$((failed + 1)); echo "== $name failed with exit code $code; it goes on"; }
    $PYTHON - "$OUT/$name.json" "$name" $code $spent "$*" <<'END'
import json, sys, torch
from common import age
path, name, code, seconds, command = sys.argv[1:]
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
facts = dict(step=name, command=command, exit_code=int(code), seconds=int(seconds), gpu=gpu,
             torch=torch.__version__) | age.now()
open(path, "w").write(json.dumps(facts, indent=1) + "\n")
END
}

RUNS=$OUT/runs
GIVT="--tokenizer vae --head gmm --runs $RUNS --overwrite"
PAIR="--tokenizer vae --head gmm --runs $RUNS --overwrite --tok_name shapes-vae"
if [ $DRY ]; then
    export PRETEND_CUDA=1                                   # tests/test_cuda.py, on tests/pretend_gpu.py
    TINY="--n_shapes 60 --tok_steps 4 --tok_batch_size 4 --steps 4 --batch_size 4 --size nano --image_size 16"
    GIVT="$GIVT $TINY --device cpu"
    PAIR="$PAIR $TINY --device cpu"
    EVALUATE="--n 20 --device cpu"
    BENCHMARK="--quick --device cpu"
    SURVEY="--quick --rounds 1 --batches 1"
    DECODING="--quick --batches 1"
    SAMPLING="--quick --rounds 1 --batches 2 --device cpu"
else
    PAIR="$PAIR --size gpt-b --steps 300 --batch_size 256"  # 86M parameters: enough to see the memory
    EVALUATE=
    BENCHMARK=
    SURVEY="--rounds 3"
    DECODING="--rounds 3 --batches 1 16"
    SAMPLING=
fi

step tests 400 $PYTHON -m pytest tests/test_cuda.py -q
step train 900 $PYTHON train.py $GIVT
step evaluate 200 $PYTHON evaluate.py "$RUNS/shapes-vae-ar-gmm" $EVALUATE
step benchmark 500 $PYTHON experiments/benchmark.py $BENCHMARK --out "$OUT/benchmark-rows.json"
step survey 400 $PYTHON experiments/survey.py --paper $SURVEY --out "$OUT/survey-rows.json"
step decoding 500 $PYTHON experiments/decoding.py $DECODING --out "$OUT/decoding-rows.json"
step mar_sampling 400 $PYTHON experiments/mar_sampling.py $SAMPLING --out "$OUT/mar_sampling-rows.json"
if [ "$GPUS" -ge 2 ]; then
    two="$PYTHON -m torch.distributed.run --standalone --nproc_per_node=2 -- train.py"
    step ddp 150 $two $PAIR --name two-ddp
    step shard 150 $two $PAIR --name two-shard --shard
fi
for name in shapes-vae-ar-gmm two-ddp two-shard; do         # pictures and logs are small, checkpoints are not
    [ -d "$RUNS/$name" ] || continue
    mkdir -p "$OUT/$name"
    cp "$RUNS/$name"/*.png "$RUNS/$name"/*.csv "$RUNS/$name"/metrics.json "$OUT/$name" 2> /dev/null
done
echo "$failed steps failed; logs and JSON lie in $OUT; $RUNS holds checkpoints and is not for git"
exit $((failed > 0))
