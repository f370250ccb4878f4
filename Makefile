# `make train` and `make test` do all set-up on a machine with make, gcc and Python 3.11, 3.12 or 3.13.
# PYTHON is the newest of these that runs here; `make train PYTHON=/path/to/python3.11` takes another.
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
STAMP := $(VENV)/.installed

.PHONY: train test test-all test-architectures check docs proto clean

train: $(STAMP)
	$(BIN)/twrun --islands 2 --devices-per-island 2 recipes/train_lm.py model=tiny train.steps=200

test: check
	$(BIN)/pytest -m "not slow" -n $(TEST_PROCESSES) --dist worksteal

test-all: check
	XLA_FLAGS= $(BIN)/pytest --ignore tests/architectures

test-architectures: $(STAMP)
	XLA_FLAGS= $(BIN)/pytest tests/architectures -n $(TEST_PROCESSES) --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Rewrites docs/api.md from the docstrings.
docs: $(STAMP)
	$(BIN)/python docs/make_api.py

# Rewrites *_pb2* from the .proto files.
proto: $(STAMP)
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --mypy_out=. torchways/rpc/torchways.proto
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --mypy_out=. torchways/graphs/graph.proto

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(or $(PYTHON),false) -c '$(IS_SUPPORTED)' || { \
	echo "torchways needs Python 3.11, 3.12 or 3.13, and $(if $(PYTHON),'$(PYTHON)' is none of them,found none)." \
	"Install one with its venv module (on Debian and Ubuntu: apt-get install python3.11 python3.11-venv)," \
	"or name one: make train PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
