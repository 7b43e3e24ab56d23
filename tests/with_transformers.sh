#!/bin/sh
# Run the tests of the model with another version of transformers than the one installed:
#
#     tests/with_transformers.sh 5.24.0
#     tests/with_transformers.sh 5.17.0 huggingface_hub==1.31.0 httpx httpcore h11 anyio certifi idna
#
# What follows the version is what that one needs besides; everything else is this environment's.
set -eu
cd "$(dirname "$0")/.."
version=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" "transformers==$version" "$@"
PYTHONPATH=$folder python -c "import transformers as t; assert t.__version__ == '$version', t"
PYTHONPATH=$folder python -m pytest -q tests/test_modeling.py tests/test_processing.py \
    tests/test_loading.py
