PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test lint types parity clean

quickstart: $(VENV)/installed-plain  ## LoRA on the embedded model: accuracy before and after, and a peft folder
	rm -rf runs/quickstart
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/jaxft train configs/quickstart/lora.yaml

test: $(VENV)/installed  ## the default tests: no torch, no network
	$(VENV)/bin/python -m pytest -n auto

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

clean:
	rm -rf $(VENV) $(VENV)-parity .jax_cache .pytest_cache .mypy_cache .ruff_cache
