# Two commands matter: `make demo` and `make test`. Both install first, where that was not done yet.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= textattack,dev
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# One thread for each process: for models as small as the demo's, and for tests side by side, more are slower.
test demo: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv and install the package with the tested versions

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the tested versions into $(VENV): a few minutes, about 3 GB of disk."
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]" -c $(CONSTRAINTS)
	touch $@

demo: install ## Train with and without a defense on the embedded corpus, and compare (a minute or two)
	$(BIN)/lightning-robust fit -c demo_undefended
	$(BIN)/lightning-robust fit -c demo
	@$(BIN)/lightning-robust report -o checkpoints/demo/report.html $(call newest,demo_undefended) $(call newest,demo)

# Runs of an earlier `make demo` stay, but are not compared.
newest = "$$(ls -td checkpoints/$(1)/version_* | head -n 1)"

test: install ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install ## Check style, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean: ## Remove environments, builds and caches; run outputs stay
	rm -rf .venv .venv-core build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
