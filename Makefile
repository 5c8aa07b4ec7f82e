# Every target makes the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOT ?= store
# One core each; what starts Ray is one worker's (tests/conftest.py). 0: all tests in one process. A worker
# that dies has failed its test and is not replaced.
TEST_WORKERS ?= 2
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: help setup demo test test-long test-faults test-demo lint format benchmarks ladder clean

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv with the pinned dependencies

# torch first and alone: a CPU machine without an index of CPU builds would otherwise be given gigabytes of CUDA by another package.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt 'torch>=2.13,<2.14'
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['dev'], sep='\n')" > $(VENV)/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $(VENV)/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(STAMP) ## The whole pipeline on real text on this machine: raw text to published model
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m jobs.pipeline --config debug storage.root=$(ROOT)

test: $(STAMP) ## All tests but the long ones
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --max-worker-restart 0

test-long: $(STAMP) ## Fault and scale tests
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m long

test-faults: $(STAMP) ## Every fault of docs/reliability.md, and its table anew (an hour and a half)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m faults tests/faults --reliability docs/reliability.md

test-demo: $(STAMP) ## The demo in every way it can be run: killed, submitted, on S3 (about ten minutes)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m demo

lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(STAMP) ## Sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Small steps, so that small networks make many: 2,048 tokens each.
LADDER := parallelism={} model.num_attention_heads=8 model.qk_nope_head_dim=24 model.qk_rope_head_dim=8 model.v_head_dim=24 \
	training.sequence_length=256 'schedule.global_batch=[{until: 100%, sequences: 8}]' checkpoint.every_steps=100 \
	evaluation.max_tokens_per_source=12000
ladder: $(STAMP) ## Muon against AdamW on the demo corpus at four sizes (under an hour on 2 cores; the same command goes on)
	$(BIN)/python -m jobs.prepare --config debug storage.root=$(ROOT)
	$(BIN)/python -m jobs.ladder --config debug --sizes 32,64,96,128 --seeds 3 --rates 1,2,4 --tuned 4 --tokens-per-parameter 0.25 \
		storage.root=$(ROOT) $(LADDER)

clean: ## Remove the environment, caches and the demo's results
	rm -rf $(VENV) $(ROOT) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include k8s/k8s.mk
