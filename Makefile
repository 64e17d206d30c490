# make quickstart: the whole recipe on this machine's CPU. make test: the tests. Both install what they need into .venv.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: quickstart test test-slow assets directions photos lint clean

quickstart: $(VENV)/.installed
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
directions: $(VENV)/.installed
	$(RUN) -m benchmarks.directions

# All stages for a few steps on real pictures, full-size tower and vocabulary: make photos PHOTOS=folder
photos: $(VENV)/.installed
	$(RUN) -m mod_jax.train --config=configs/photos.py:$(PHOTOS) --workdir=runs/photos

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .

$(VENV)/.installed: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}. Say PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --progress-bar=on -r requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(RUN) -m pip install --disable-pip-version-check --progress-bar=on -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .cache runs data
