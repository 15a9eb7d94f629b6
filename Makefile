# Every target sets up what it needs by itself (tools/bootstrap.py); running it again is quick.

# TORCH=torch==2.13.0 makes a .venv with that one; the default is what the active environment has, or else the newest of
# requirements/torch.txt.
PYTHON ?= python3

bootstrap = $(PYTHON) tools/bootstrap.py $(if $(TORCH),--torch '$(TORCH)')
in-env = PATH="$$(dirname "$$(cat build/python-path)"):$$PATH"
cpp-files = $(shell find csrc include tests/cpp tests/kernels docs/tutorial -name '*.[ch]*' -not -name '*.pyc' -o -name '*.inl')

.PHONY: help demo test test-all wheel matrix sanitize bench docs check-links lint format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## train three models on real data, with native and fused losses side by side
	$(bootstrap)
	$(in-env) python -m examples.demo

test: ## run tests of every kind, in minutes, and say what was left out
	$(bootstrap)
	@$(in-env) sh tools/test.sh --quick

test-all: ## run every test that this machine can run
	$(bootstrap)
	@$(in-env) sh tools/test.sh

wheel: ## build a wheel for this torch, CUDA kernels included, and try it in an empty environment
	$(bootstrap) --no-build
	$(in-env) python -m pip install --quiet -r requirements/wheel.txt
	$(in-env) python tools/wheel.py

matrix: ## build and test beside the oldest and the newest torch, for CPUs and for GPUs, each in its own environment
	$(PYTHON) tools/matrix.py

sanitize: ## run C++ and Python tests in builds that look for errors of memory, undefined behaviour and data races
	$(bootstrap) --no-build
	$(in-env) python tools/sanitize.py

bench: ## measure the losses beside native torch and torch.compile
	$(bootstrap)
	$(in-env) python -m benchmarks --device cpu

docs: ## build the documents as a site, in build/docs; a broken link stops it
	$(bootstrap)
	$(in-env) python -m pip install --quiet -r requirements/docs.txt
	$(in-env) python -m sphinx -W --keep-going --quiet docs build/docs

check-links: docs ## see whether the documents' links to other sites lead somewhere
	$(in-env) python -m sphinx -b linkcheck docs build/linkcheck

lint: ## check style, formatting and types
	$(bootstrap) --no-build
	$(in-env) ruff check .
	$(in-env) ruff format --check .
	$(in-env) mypy
	$(in-env) clang-format --dry-run -Werror $(cpp-files)

format: ## repair style and formatting
	$(bootstrap) --no-build
	$(in-env) ruff check --fix .
	$(in-env) ruff format .
	$(in-env) clang-format -i $(cpp-files)

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info fusedloss/_C*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
