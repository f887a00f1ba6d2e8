# Every target sets up what it needs first; `make` alone lists them. ARGS goes to the program: make test ARGS="-k ldam -x"

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test bench codecheck docs gpu wheel lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built ## make .venv with the pinned packages and build the C++ core in it

demo: setup ## train on real long-tailed data: python/train.py
	@$(RUN) python/train.py $(ARGS)

test: setup ## run the tests and the examples in docstrings; without ARGS a process for each core, 8 at most
	@$(RUN) -m pytest $(or $(ARGS),-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder)

bench: setup ## measure the kernels against their peers
	@$(RUN) -m ltkernels bench $(ARGS)

codecheck: setup ## read the GPU kernels' machine code and compare it with the budget; needs no GPU
	@$(RUN) -m benchmarks.codecheck $(ARGS)

docs: setup ## build the documentation into build/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)
	@echo "docs: open build/site/index.html"

gpu: setup ## on a machine with a GPU: tests, sanitizers and benchmark
	@$(RUN) -m benchmarks.gpu $(ARGS)

# Modules that were deleted from the tree since the last build are still in build/lib, and setuptools would ship them.
wheel: setup ## make the sdist, and the wheel for this Python, into dist/
	@rm -rf build/lib* build/bdist* build/wheel
	@$(RUN) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >/dev/null
	@$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	@PATH="$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	@ls -sh dist

lint: setup ## check style and types, change nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: setup ## bring all code into the style that lint checks
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove what the build and the tests wrote, but not .venv
	rm -rf build dist *.egg-info ltkernels/lib ltkernels/_host.*.so $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find ltkernels tests python benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: requirements.txt requirements-alone.txt
	@echo "setup: creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { echo "setup: $(PYTHON) cannot make a venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setup: installing the packages of requirements.txt (torch takes a minute or more)"
	@$(RUN) -m pip install --quiet -r requirements.txt
	@$(RUN) -m pip install --quiet --no-deps -r requirements-alone.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(shell find csrc -type f)
	@echo "setup: building ltkernels in place; a minute, with nvcc some ten (LTK_CUDA=0 leaves the CUDA kernels out)"
	@$(RUN) -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(RUN) -m ltkernels info
	@touch $@
