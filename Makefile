PYTHON ?= python3
VENV ?= .venv
# The first Python 3.12 that runs (one of pyenv's shims may not): on the path, or among pyenv's own.
PYTHON_NEWEST ?= $(shell for p in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python; do \
	"$$p" -c 'import venv' 2>/dev/null && echo "$$p" && break; done)

.PHONY: quickstart test slow newest lint types parity clean

quickstart: $(VENV)/installed-plain  ## LoRA on the embedded model: accuracy before and after, and a peft folder
	rm -rf runs/quickstart
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/jaxft train configs/quickstart/lora.yaml

test: $(VENV)/installed  ## the default tests: no torch, no network
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

slow: $(VENV)/installed  ## the dearest tests, which the default leaves out: runs killed and resumed, the README's commands
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m slow

# What the newest releases can break, without the slow half: the sweep over the laws, whole runs, the README, data
newest: $(VENV)-newest/installed  ## the quick half of the tests on Python 3.12 and the newest releases
	$(VENV)-newest/bin/python -c 'import sys, jax, flax, numpy; print("Python", sys.version.split()[0], \
		"jax", jax.__version__, "flax", flax.__version__, "numpy", numpy.__version__)'
	$(VENV)-newest/bin/python -m pytest -n auto --dist loadfile tests/models tests/methods tests/losses tests/train tests/parity \
		tests/parallel tests/quant tests/test_plan.py

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed-lint
	$(VENV)/bin/mypy

parity: $(VENV)-parity/installed  ## live comparison with torch, transformers and peft
	$(VENV)-parity/bin/python -m pytest -m parity

$(VENV)/installed-plain: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed: $(VENV)/installed-plain
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	touch $@

# torch first and alone: the release that the comparison was made with, as a build without CUDA where there is one
$(VENV)-parity/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,parity]'
	touch $@

$(VENV)-newest/installed: pyproject.toml
	@test -n "$(PYTHON_NEWEST)" || { echo "no Python 3.12 is found: make newest PYTHON_NEWEST=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON_NEWEST)" -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-parity $(VENV)-newest .jax_cache .pytest_cache .mypy_cache .ruff_cache
