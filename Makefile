# Every target sets up what it needs: .venv, with the versions in constraints.txt. Nothing to install beforehand
# but Python >= 3.11 (with venv) and make. A set-up that was cut short leaves no stamp and starts afresh.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/stamp
BENCH := .venv/bench
LOG := .venv/install.log
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --no-compile
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow lint bench bench-gpu setup clean

help:  ## list the targets
	@echo "make TARGET [ARGS='more arguments for the command'] [PYTHON=python3.12]"
	@sed -n 's/^\([a-z][a-z-]*\):.*  ## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

quickstart: $(STAMP)  ## train two small models, measure and compare them, in runs/quickstart
	$(BIN)/latentlm quickstart --output runs/quickstart $(ARGS)

# One thread everywhere: sums in another order give other last digits.
test test-slow: export OMP_NUM_THREADS ?= 1
test test-slow: export MKL_NUM_THREADS ?= 1
test test-slow: export TOKENIZERS_PARALLELISM = false
test test-slow: export HF_HUB_OFFLINE = 1

# Two processes; each takes whole files, whose tests share what they have trained. ARGS='-n 8' for more, '-n 0' for one.
test: $(STAMP)  ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## run the slow tests alone
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

lint: $(STAMP)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

bench: $(STAMP) $(BENCH)  ## run all benchmarks small, one table of ratios (about 5 minutes); figures in benchmarks/results
	$(BIN)/python benchmarks/_suite.py $(ARGS)

bench-gpu: $(STAMP) $(BENCH)  ## those that have a GPU to be fast on, at full size, on CUDA
	$(BIN)/python benchmarks/_suite.py --device cuda --whole $(ARGS)

# the peers that the benchmarks compare with
$(BENCH): $(STAMP)
	@echo "Installing the peers that benchmarks compare with ..."
	@$(PIP) install -c constraints.txt -e '.[bench]' >> $(LOG) 2>&1 || { tail -n 30 $(LOG); exit 1; } >&2
	@touch $(BENCH)

setup: $(STAMP)  ## only install, into .venv

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks studies -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

# pip compiles on one core, and all that nobody imports: compileall takes all cores, and leaves out others' tests and
# models. A file that is no Python of this version (a template) is no failure.
# The stamp holds the path of the checkout that it was made for, as scripts in .venv do: a moved or copied one is made anew.
ifneq ($(shell [ -x $(BIN)/python ] && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" ] && echo valid),valid)
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	if [ ! -x $(BIN)/python ] || [ "$$(cat $(STAMP) 2>/dev/null)" != "$$(pwd -P)" ]; then \
	  python=; \
	  for candidate in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "latentlm needs Python 3.11 or newer with its venv module (Debian, Ubuntu: python3-venv); install one, or name it: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up .venv with $$("$$python" --version) ..."; \
	  "$$python" -m venv --clear .venv; \
	fi; \
	rm -f $(STAMP); : > $(LOG); \
	trap 'if [ $$? -ne 0 ]; then tail -n 30 $(LOG); echo "The set-up failed; all of its output is in $(LOG)."; fi >&2' EXIT; \
	if nvidia-smi -L >> $(LOG) 2>&1; then \
	  echo "Installing $(TORCH) for the NVIDIA GPU ..."; \
	  $(INSTALL) $(TORCH) -c constraints.txt >> $(LOG) 2>&1; \
	else \
	  echo "Installing $(TORCH), CPU build ..."; \
	  $(INSTALL) --no-index --no-deps $(TORCH) >> $(LOG) 2>&1 \
	    || $(INSTALL) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH) >> $(LOG) 2>&1 \
	    || $(INSTALL) --no-deps $(TORCH) >> $(LOG) 2>&1; \
	fi; \
	echo "Installing latentlm and what it needs (a few minutes at most) ..."; \
	$(INSTALL) -c constraints.txt -e '.[test,dev]' >> $(LOG) 2>&1; \
	$(PIP) check >> $(LOG) 2>&1; \
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/|/transformers/models/' .venv/lib >> $(LOG) 2>&1 || true; \
	pwd -P > $(STAMP); \
	echo "Set up."
