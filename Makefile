# make quickstart: the whole recipe on this machine's CPU. make test: the tests. Both install what they need into .venv.
# the first of these that runs and is new enough (a name on the PATH may be a shim without an interpreter behind it)
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: quickstart test test-slow assets directions photos lint clean

quickstart: $(VENV)/.installed data/scenes
	$(RUN) -m mod_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(RUN) -m mod_jax.generate --run=$(WORKDIR) --scene=0 --question="Describe the picture."

test: $(VENV)/.installed-test
	$(RUN) -m pytest -q --durations=15 --cov --cov-report=term:skip-covered

test-slow: $(VENV)/.installed-test
	$(RUN) -m pytest -q -m slow --durations=15

# The pretrained tower, language model and teacher that assets/ ships, trained again from nothing.
assets: $(VENV)/.installed
	$(RUN) -m benchmarks.pretrain

# The paper's directions over several seeds.
directions: $(VENV)/.installed data/scenes
	$(RUN) -m benchmarks.directions

# All stages for a few steps on real pictures, full-size tower and vocabulary: make photos PHOTOS=folder
photos: $(VENV)/.installed
	$(RUN) -m mod_jax.train --config=configs/photos.py:$(PHOTOS) --workdir=runs/photos

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .

# the built-in set without its train split, which only the teacher reads
data/scenes: $(VENV)/.installed
	$(RUN) -m mod_jax.data.scenes --data_dir $@ --train 0
	touch $@

$(VENV)/.installed: requirements.txt setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one, or say make PYTHON=path/to/python3.11"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --progress-bar=on -r requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(RUN) -m pip install --disable-pip-version-check --progress-bar=on -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .cache runs data
