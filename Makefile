# make setup | demo | test | check | format | bench | bench-check
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test check format reference bench bench-check clean

setup: $(READY)

# torch first and by this pin: where a CPU wheel of it is at hand, nothing pulls the CUDA build.
$(READY): pyproject.toml
	@echo "installing torch, transformers, lm-eval and the rest into $(VENV): 2.4 GB, some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,export,track]'
	touch $@

demo: $(READY)
	$(BIN)/qatrun train demo --resume

# A process for each core, a test file at a time.
test: $(READY)
	$(BIN)/pytest -n auto --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/reference.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(READY)
	$(BIN)/python scripts/reference.py

# On a machine that does nothing else. BENCH=cuda for the GPU. In an environment of its own: where torchao is installed,
# transformers loads it and prints its warnings.
BENCH ?= cpu
BENCH_VENV := .venv-bench
$(BENCH_VENV)/.ready: pyproject.toml
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet torch==2.13.0
	$(BENCH_VENV)/bin/pip install --quiet --editable '.[bench]'
	touch $@

bench: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python scripts/bench.py all --device $(BENCH) --output scripts/bench_results

bench-check: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python scripts/bench.py all --device $(BENCH) --quick --check scripts/bench_results

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
