#!/bin/sh
# TRL's own trainers on the demo's pages, as docs/trl.md has them: their losses have to fall.
#
#     tests/with_trl.sh 1.16.0
#
# TRL goes to a folder of its own; everything else is this environment's.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder/packages" "trl==$1"
export PYTHONPATH="$folder/packages:$PWD" HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" OMP_NUM_THREADS=1
python -m demo.make_checkpoint --out "$folder/model"
python -m demo.make_datasets docvqa --out "$folder/data"
gpu=$(python -c "import torch; print(torch.cuda.is_available())")
[ "$gpu" = True ] || flags="--use_cpu --bf16 false"
for trainer in sft dpo; do
    python docs/trl_$trainer.py --model_name_or_path "$folder/model" --dataset_name "$folder/data" \
        --output_dir "$folder/$trainer" --learning_rate 1e-3 --max_steps 200 --logging_steps 20 \
        --disable_tqdm true --report_to none ${flags:-}
    python - "$folder/$trainer" <<'CHECK'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
state = json.loads((folder / "checkpoint-200" / "trainer_state.json").read_text())
losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
print(f"{folder.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.85 * losses[0] and (folder / "adapter_model.safetensors").is_file()
CHECK
done
