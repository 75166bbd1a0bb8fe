# Every task of the project. Each sets up what it needs by itself: Python 3.11 to 3.13 and
# make are all that has to be there. `make` alone lists the tasks.

# which Python makes the environment; empty: the newest that is found and supported
PYTHON ?=
VENV ?= .venv
# where `make run` listens (empty: as CARRY_PORT says, else 8000)
PORT ?=
# which example `make example` trains
NAME ?= flights
# further options of the task's command
ARGS ?=

export PYTHON VENV
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test model faults check docs format bench bench-micro load overload example compose-test lock clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

# logs for a person, unless told otherwise
run: export CARRY_LOG_FORMAT ?= console
run: ## serve the pretrained models on http://127.0.0.1:8000 (PORT=9000 for another port)
	@scripts/setup run
	@exec $(BIN)/carry serve $(if $(PORT),--port $(PORT)) $(ARGS)

test: ## run the tests (ARGS="tests/service -x" for some of them)
	@scripts/setup dev
	@exec $(BIN)/python -m pytest -q $(ARGS)

model: ## explore the model of the protocol to its end (ARGS="--depth 12 --traces")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.protocol $(ARGS)

faults: ## break workers and stores under load, check every output (ARGS="--store valkey")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults $(ARGS)

check: ## lint, formatting, types, import contracts and the links of the documentation
	@scripts/setup dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/zensical build --strict --clean

docs: ## write the documentation as a site into build/site; broken links fail
	@scripts/setup dev
	@exec $(BIN)/zensical build --strict --clean $(ARGS)

format: ## mend what the linter and the formatter can mend
	@scripts/setup dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: ## measure Carry beside floors and baselines (ARGS="--full --jsonl bench.jsonl --report")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.bench $(ARGS)

bench-micro: ## measure codec, queue, encode, wire and store by themselves
	@scripts/setup dev
	@exec $(BIN)/python -m tests.bench.micro $(ARGS)

load: ## load a running service, check its answers (ARGS="--scenario steady --users 32")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.load $(ARGS)

overload: ## twice what a service of its own can do, for a minute (ARGS="--steps 256")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.load.overload $(ARGS)

example: ## train an example from nothing, compare it with baselines (NAME=customers)
	@scripts/setup dev
	@exec $(BIN)/python -m models.examples.$(NAME) $(ARGS)

compose-test: ## build the containers and prove that streams survive their restarts
	@scripts/setup dev
	@exec $(BIN)/python -m pytest -q -s -m compose tests/compose $(ARGS)

lock: ## lock the dependencies anew (needs uv; ARGS=--upgrade for newer ones)
	@scripts/lock $(ARGS)

clean: ## remove the environment and every cache; keeps the streams in .carry
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
