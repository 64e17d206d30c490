# make quickstart runs the whole recipe on this machine's CPU, make test runs the tests.
# Every target first installs what it needs into .venv.

# The first of these that runs and is new enough; a name on the PATH may be a shim without an
# interpreter behind it.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
# Processes that run tests, at up to 5 GB each. Compilation alone keeps only one core busy.
WORKERS ?= 2
PRESET ?= real-vocab
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: quickstart test coverage test-slow test-beam assets directions photos families check-4.57 check-compilers rehearse compare lint clean

quickstart: $(VENV)/.installed data/scenes
	$(RUN) -m mod_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(RUN) -m mod_jax.generate --run=$(WORKDIR) --scene=0 --question="Describe the picture."

# All tests but the slow ones, on eight virtual CPU devices.
PYTEST := $(RUN) -m pytest -q --numprocesses=$(WORKERS) --dist=loadfile --durations=15
test: $(VENV)/.installed-test
	$(PYTEST)

# The same tests, and the lines that none of them runs. Following every call of Python nearly doubles
# the time in which programs are traced.
coverage: $(VENV)/.installed-test
	$(PYTEST) --cov --cov-report=term:skip-covered

# Only the tests that are marked as slow.
test-slow: $(VENV)/.installed-test
	$(RUN) -m pytest -q -m slow --durations=15

# Tests of preparing data as an Apache Beam pipeline. Beam needs older packages than requirements.txt
# pins, so it gets an environment of its own.
test-beam: $(VENV)-beam/.installed
	$(VENV)-beam/bin/python -m pytest -q tests/test_beam.py

# Trains the vision tower, language model and teacher in assets/ again, from random weights.
assets: $(VENV)/.installed
	$(RUN) -m benchmarks.pretrain

# Measures the paper's claims over three seeds (benchmarks/LOG.md).
directions: $(VENV)/.installed data/scenes
	$(RUN) -m benchmarks.directions

# All stages for a few steps on real pictures, with a full-size tower and vocabulary:
#   make photos PHOTOS=folder
photos: $(VENV)/.installed
	$(RUN) -m mod_jax.train --config=configs/photos.py:$(PHOTOS) --workdir=runs/photos

# Compares every model family and folder layout with transformers and writes the table in
# docs/checkpoints.md.
families: $(VENV)/.installed-test
	$(RUN) tests/families.py

# Runs exported students in stock transformers 4.57, in an environment of its own. The expected values
# are computed in .venv.
check-4.57: $(VENV)/.installed-test $(VENV)-4.57/.installed
	PYTHONPATH=tests $(RUN) -m stock.write runs/stock
	$(VENV)-4.57/bin/python tests/stock/check.py runs/stock

# Compiles the train step for TPUs and NVIDIA GPUs, of which none has to be here, and reads the
# programs. Each compiler gets an environment of its own (0.5 and 4 GB).
check-compilers: $(VENV)-tpu/.installed $(VENV)-gpu/.installed
	$(VENV)-tpu/bin/python -m pytest -q -k "not h100" --durations=5 tests/compilers
	$(VENV)-gpu/bin/python -m pytest -q -k h100 --durations=5 tests/compilers

# Compiles all stages of a recipe for accelerators that need not be here, and says whether they fit,
# how long a step takes at best and what it sends (docs/rehearsal.md):
#   make rehearse TOPOLOGY=v5e-64 CONFIG=configs/llava_mod.py:qwen1.5-1.8b
#   make rehearse TOPOLOGY=h100-8 CONFIG=configs/quickstart.py ARGS="--stage=sparse_mimic --search"
TOPOLOGY ?= v5e-64
CONFIG ?= configs/quickstart.py
COMPILER := $(VENV)-$(if $(filter v% tpu%,$(TOPOLOGY)),tpu,gpu)
rehearse: $(COMPILER)/.installed
	$(COMPILER)/bin/python -m mod_jax.rehearse --config=$(CONFIG) --topology=$(TOPOLOGY) $(ARGS)

# Compares time and memory with the PyTorch peer, which gets an environment of its own
# (docs/benchmarks.md).
compare: $(VENV)/.installed $(VENV)-peer/.installed
	mkdir -p runs
	$(RUN) -m benchmarks.compare --preset $(PRESET) --json runs/compare-$(PRESET).json

# The same checks as .pre-commit-config.yaml.
lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The built-in scenes without their train split, which only the teacher is trained on.
data/scenes: $(VENV)/.installed
	$(RUN) -m mod_jax.data.scenes --data_dir $@ --train 0
	touch $@

$(VENV)/.installed: requirements.txt setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one, or run make PYTHON=path/to/python3.11"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --progress-bar=on -r requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(RUN) -m pip install --disable-pip-version-check --progress-bar=on -r requirements-test.txt
	touch $@

$(VENV)-beam/.installed: requirements-beam.txt setup.py
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/python -m pip install --disable-pip-version-check --progress-bar=on -r requirements-beam.txt -e .
	touch $@

$(VENV)-tpu/.installed $(VENV)-gpu/.installed: $(VENV)-%/.installed: requirements.txt requirements-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --progress-bar=on -r requirements-$*.txt
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)-peer/.installed: benchmarks/peer/requirements.txt
	$(PYTHON) -m venv $(VENV)-peer
	$(VENV)-peer/bin/python -m pip install --disable-pip-version-check --progress-bar=on -r benchmarks/peer/requirements.txt
	touch $@

$(VENV)-4.57/.installed: requirements-4.57.txt
	$(PYTHON) -m venv $(VENV)-4.57
	$(VENV)-4.57/bin/python -m pip install --disable-pip-version-check --progress-bar=on -r requirements-4.57.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-beam $(VENV)-4.57 $(VENV)-tpu $(VENV)-gpu $(VENV)-peer .cache runs data
