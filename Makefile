# make run, make test: the two commands. Both make .venv and install first.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# One Atari game from nothing to a report in a few minutes on two cores.
ARGS   ?= agent=episodic_control env=Pong experiment=pong
# faiss comes in two builds that exclude each other: the one for NVIDIA cards where a driver answers, else the one for processors.
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: run setup test test-slow lint clean

run: $(VENV)/.installed
	$(PY) launch.py $(ARGS)

setup: $(VENV)/.installed

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(PY) -m pytest -m slow -o addopts=--strict-markers

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Reverie needs Python 3.11 or newer (make PYTHON=python3.11)"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(DEVICE)]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(DEVICE),dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
