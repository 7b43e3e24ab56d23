# make demo                 the whole UCF-101 recipe on a CPU, offline, in a few minutes
# make demo-docvqa          the same for DocVQA,
# make demo-hateful-memes   for Hateful Memes
# make demo-nlvr2           and for NLVR2
# make test                 lint and the tests, in minutes
# make test-all             those that take long too: random kills, all demos, benchmarks; and whether
#                           the tests notice faults that are planted
# make test-versions        the model on other versions of transformers, which are downloaded
# make test-vllm            what a recipe saves, in vLLM, of which 3.4 GB are downloaded
# make test-trl             TRL's own trainers on this model, see docs/trl.md
# make test-trackers        TensorBoard, MLflow, trackio and wandb, all offline
# make gpu                  on a machine with a GPU: the tests that need one, and in ten minutes tables
#                           of what it does, which go into benchmarks/results
# All make .venv from requirements.txt first. Another Python: make PYTHON=python3.12 demo
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-docvqa demo-hateful-memes demo-nlvr2 lint
.PHONY: test test-all test-versions test-vllm test-trl test-trackers gpu

demo: .venv/installed
	$(BIN)/python -m demo.run --work_dir demo_output

demo-docvqa: .venv/installed
	$(BIN)/python -m demo.run docvqa --work_dir demo_output

demo-hateful-memes: .venv/installed
	$(BIN)/python -m demo.run hateful_memes --work_dir demo_output

demo-nlvr2: .venv/installed
	$(BIN)/python -m demo.run nlvr2 --work_dir demo_output

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A file's tests stay together, as they share what takes long to make. The longest files come first,
# see tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not long"

test-all: lint
	$(PYTEST)
	$(BIN)/python -m tests.mutants

test-versions: .venv/installed
	$(BIN)/python -m tests.versions

test-vllm: .venv/installed
	$(BIN)/python -m tests.with_vllm

test-trl: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/with_trl.sh 1.16.0

test-trackers: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/with_trackers.sh

# Each part runs whatever became of the ones before it. Another set of parts to try the command
# without a GPU: make gpu GPU_TABLE="--size small --device cpu" RECIPE_TABLE="--size tiny"
GPU_TABLE := --minutes 5
RECIPE_TABLE := --batch_size 8 --steps 4

gpu: .venv/installed
	@failed=""; \
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} \
		$(BIN)/python -m pytest tests/test_gpu.py || failed="$$failed tests"; \
	$(BIN)/python -m benchmarks.gpu --save $(GPU_TABLE) || failed="$$failed benchmarks.gpu"; \
	$(BIN)/python -m benchmarks.recipe_table --save $(RECIPE_TABLE) || \
		failed="$$failed benchmarks.recipe_table"; \
	echo; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed"; exit 1; fi; \
	echo "make gpu: all done; the tables are in benchmarks/results"

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
