.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

BENCHMARKS := auto_digits awm_digits awm_speed awm_scaling awm_outcome perturbation_step zoo auto_verdicts auto_classes auto_ablation \
	erase awm_large_images

.PHONY: help demo run test check migrate lint bench fuzz
help: ## Show this help
	@awk -F':.*## ' '/^[a-z.]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: .venv/.installed ## Build the environment (all extras) from constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Weightwash needs Python 3.11 or newer; run: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service,worker,torchvision,timm,dev]'
	@touch $@

demo: .venv/.installed ## Purify a backdoored classifier through the real service, over curl
	$(BIN)/python -m examples.demo $(if $(SEED),--seed $(SEED))

run: .venv/.installed ## Serve on 127.0.0.1:8000 with one worker (SQLite, files under var/)
	@exec $(BIN)/python -m service serve

migrate: .venv/.installed ## Bring the database of WEIGHTWASH_DATABASE_URL to the newest schema
	$(BIN)/alembic upgrade head

test: .venv/.installed ## Run all tests (SQLite, and a Postgres and Redis it starts itself)
	$(BIN)/python -m pytest

bench: .venv/.installed ## Run the benchmarks, or with QUICK=1 a part of each; resumes in var/bench
	@mkdir -p var/bench
	@for name in $(BENCHMARKS); do echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name $(if $(QUICK),--quick) --out var/bench/$$name$(if $(QUICK),-quick).jsonl \
		|| exit 1; done

fuzz: .venv/.installed ## Fuzz every parser for SECONDS=600, two at a time; corpora under var/fuzz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m fuzz --seconds $(or $(SECONDS),600) --jobs 2 --out var/fuzz/results.jsonl $(TARGETS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.support.loading_rule

check: lint test ## ruff, mypy, import contracts, compose and Dockerfile checks, then all tests
