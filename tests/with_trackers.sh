#!/bin/sh
# Train with the real trackers, offline, and look into what they stored. They go to an environment of
# their own, which sees this one's packages.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m venv "$folder"
python -c "import site; print(site.getsitepackages()[0])" > "$("$folder/bin/python" -c \
    "import site; print(site.getsitepackages()[0])")/outer.pth"
"$folder/bin/python" -m pip install --quiet tensorboard==2.21.0 wandb==0.31.0 trackio==0.43.0 \
    mlflow-skinny==3.17.2
"$folder/bin/python" -m pytest -q tests/test_trackers.py
