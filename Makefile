# make quickstart | make check | make test | make bench | make setup | make slow | make docs
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

# A module's tests stay together, and a process that has none left takes half of another's.
WORKERS = logical
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

.PHONY: setup quickstart check test pytest slow bench lint

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(READY)

# Logs from the simulators, shards, one set of weights, the table and its report.
quickstart: setup
	$(BIN)/python -m etl.record -e Hopper-v4 --policy expert --steps 20000 --noise 0.1 -o data/quickstart/logs/d4rl --overwrite
	$(BIN)/python -m etl.record -e ALE/Freeway-v5 --policy expert --steps 8000 --noise 0.05 -o data/quickstart/logs/dqn_replay --overwrite
	$(BIN)/python -m etl.build --source d4rl --input data/quickstart/logs/d4rl --output data/quickstart/shards/d4rl
	$(BIN)/python -m etl.build --source atari --input data/quickstart/logs/dqn_replay --output data/quickstart/shards/atari
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed trainer/main.py --recipe quickstart
	$(BIN)/python -m eval.compare --gato runs/quickstart/export --root data/quickstart/shards --baselines runs/quickstart/baselines --episodes 5 --output results/quickstart
	@echo "Open results/quickstart/report.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that start no process: for every change.
check: TESTS = -m "not process and not slow"
# All that CI runs; with a worker more than there are cores, since tests of signals and lost processes wait.
test: WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

check test: setup
	$(MAKE) --no-print-directory --jobs 2 lint pytest TESTS='$(TESTS)' WORKERS=$(WORKERS)

pytest: setup
	$(PYTEST) $(TESTS)

slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python -m benchmarks

# The pages, README and docstrings as a site in build/site; its tools have a small environment of their own.
.PHONY: docs
docs:
	test -x .venv-docs/bin/mkdocs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check $$(.venv-docs/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	.venv-docs/bin/mkdocs build --strict --quiet
	@echo "Open build/site/index.html"
