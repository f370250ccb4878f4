# `make train` and `make test` do all set-up from a machine with python3.11, make and gcc.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
STAMP := $(VENV)/.installed

.PHONY: train test test-all test-architectures check proto clean

train: $(STAMP)
	$(BIN)/twrun --islands 2 --devices-per-island 2 recipes/train_lm.py model=tiny train.steps=200

test: check
	$(BIN)/pytest -m "not slow" -n $(TEST_PROCESSES) --dist worksteal

test-all: check
	$(BIN)/pytest --ignore tests/architectures

test-architectures: $(STAMP)
	$(BIN)/pytest tests/architectures

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Rewrites *_pb2* from the .proto files.
proto: $(STAMP)
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --mypy_out=. torchways/rpc/torchways.proto
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --mypy_out=. torchways/graphs/graph.proto

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
