# Tasks of the project. Each sets up what it needs; only Python 3.11 to 3.14 and
# make must be installed. `make` without a task lists them.

# Python of the environment; empty: the newest supported one
PYTHON ?=
VENV ?= .venv
# port of `make run`; empty: CARRY_PORT, or 8000
PORT ?=
# example that `make example` trains
NAME ?= flights
# worker processes of the tests: one more than cores, since many tests wait for servers
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
# the alerts for Kubernetes
RULE := deploy/kubernetes/base/prometheus-rule.yaml
# additional options of the task's command
ARGS ?=

export PYTHON VENV
# the tests start hundreds of processes: each would compile what it imports
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
# a file's tests stay together, as they share its fixtures; its files keep their order
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test test-harness coverage model faults topic-faults version-faults backfill-faults handover-faults check docs notebooks format bench load dashboards rules overload example compose-test proto console lock clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

# readable logs by default
run: export CARRY_LOG_FORMAT ?= console
run: ## serve the pretrained models on http://127.0.0.1:8000 (PORT=9000 for another port)
	@scripts/setup run
	@exec $(BIN)/carry serve $(if $(PORT),--port $(PORT)) $(ARGS)

test: ## run the tests on every core (ARGS="tests/service -x" for some, WORKERS=0 for one process)
	@scripts/setup dev
	@exec $(PYTEST) $(ARGS)

test-harness: ## run the tests of the harnesses: benchmark, load, faults with planted bugs, protocol model
	@scripts/setup dev
	@exec $(PYTEST) -m harness $(ARGS)

coverage: ## run the tests and report branch coverage (ARGS="tests/models" for some of them)
	@scripts/setup dev
	@exec $(PYTEST) --cov --cov-report=term --cov-report=html $(ARGS)

model: ## explore the protocol model exhaustively (ARGS="--depth 12 --traces")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.protocol $(ARGS)

faults: ## inject faults into workers and stores under load, check every output (ARGS="--store valkey")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults $(ARGS)

topic-faults: ## inject faults into consumers and stores, check every output (ARGS="--store valkey")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults.topics $(ARGS)

version-faults: ## change versions of a model while workers and stores are killed (ARGS="--store redis")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults.versions $(ARGS)

backfill-faults: ## interrupt backfills at random moments, compare their bytes (ARGS="--kills 50")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.backfill kills $(ARGS)

handover-faults: ## load a history of 100,000 streams while their events go on (ARGS="--streams 2000")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults.handover $(ARGS)

check: ## run the linter, the formatter, the type checker, import contracts and the link checker
	@scripts/setup dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 client/carry_client
	$(BIN)/lint-imports
	$(BIN)/zensical build --strict --clean

docs: ## build the documentation site in build/site; fails on broken links
	@scripts/setup dev
	@exec $(BIN)/zensical build --strict --clean $(ARGS)

notebooks: ## write the guides to moving from another server as notebooks to build/notebooks
	@scripts/setup dev
	@exec $(BIN)/python scripts/notebooks build/notebooks

format: ## apply the fixes of the linter and the formatter
	@scripts/setup dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: ## measure Carry beside baselines (ARGS="--only peak")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.bench $(ARGS)

load: ## send load to a running service, check its replies (ARGS="--scenario steady --users 32")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.load $(ARGS)

dashboards: ## run every query of the dashboards under replay (ARGS="--pictures FOLDER")
	@scripts/setup dev
	@exec $(BIN)/python -m tests.monitoring $(ARGS)

rules: ## write the Prometheus rules into the PrometheusRule manifest
	@{ sed '/^spec:/q' $(RULE); sed -n '/^groups:/,$$ { s/^./  &/; p }' deploy/prometheus/rules.yml; } >$(RULE).new
	@mv $(RULE).new $(RULE)

overload: ## send twice the capacity of a service for a minute
	@scripts/setup dev
	@exec $(BIN)/python -m tests.bench --only overload --runtimes onnxruntime --seconds 10 --strict $(ARGS)

example: ## train an example from scratch, compare it with baselines (NAME=customers)
	@scripts/setup dev
	@exec $(BIN)/python -m examples.$(NAME) $(ARGS)

compose-test: ## build the containers, test that streams survive restarts
	@scripts/setup dev
	@exec $(BIN)/python -m pytest -q -s -m compose tests/compose $(ARGS)

proto: ## generate the gRPC messages from service/transports/v2/grpc/v2.proto
	@scripts/setup dev
	@exec $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. service/transports/v2/grpc/v2.proto

console: ## bundle the console from service/console/web into service/console/assets (needs Node.js)
	@cd service/console/web && npm ci --silent && npm run --silent check && npm run --silent build

lock: ## update the lock files (needs uv; ARGS=--upgrade for newer versions)
	@scripts/lock $(ARGS)

clean: ## remove the environment and every cache; keeps the streams in .carry
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .cache htmlcov
	rm -rf service/console/web/node_modules
	rm -f .coverage .coverage.* models/detection/libdetection.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
