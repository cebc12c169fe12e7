# Every target makes its own .venv when there is none.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
# The tests start hundreds of interpreters: what was compiled once is kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-team test torture check docs bench clean
help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(STAMP)  ## Push, change and pull a real checkpoint of 22.7 M parameters
	$(BIN)/python examples/demo.py

demo-team: $(STAMP)  ## Four jobs on real servers (PostgreSQL, S3) on loopback, one of them killed
	$(BIN)/python examples/demo_team.py

test: $(STAMP)  ## Run all tests; one: make test T="tests/test_stores.py -k durable"
	$(BIN)/python -m pytest $(if $(T),$(T),-n 3 --dist loadfile --no-loadscope-reorder)

MINUTES := 10
torture: $(STAMP)  ## The tests of safety for longer, on fresh seeds: make torture MINUTES=60
	$(BIN)/python -m pytest -n 2 --dist worksteal --minutes $(MINUTES) $(T)
	$(BIN)/python docs/generate.py

check: $(STAMP)  ## Lint, types, layers, documents, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/generate.py --check
	$(MAKE) test

docs: $(STAMP)  ## Write the generated pages
	$(BIN)/python docs/generate.py

bench: $(BENCH_STAMP)  ## Measure beside peers; writes docs/benchmarks.md; some tables: make bench T="push pull"
	$(BIN)/python -m benchmarks $(T)

clean:  ## Remove what the other targets made
	rm -rf $(VENV) .venv-dvc build *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench]'
	test -d .venv-dvc || python3 -m venv .venv-dvc  # its pins and ours clash
	.venv-dvc/bin/python -m pip install --quiet 'dvc[s3]'
	touch $@
