# Every target works on a fresh clone with Python 3.11 alone; `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Extras of pyproject.toml to install; CI takes them all: make install EXTRAS=dev,spark,tracing,ui,valkey
EXTRAS ?= dev,ui

# Options of `make demo`; see `make demo OPTIONS=--help`.
EVENTS ?=
ITEMS ?=
KEEP ?=
OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test soak lint format typecheck proto clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv with everything pinned, and unpack Triton into it

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11 or name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing into $(VENV) (about 2 minutes; the log is $(VENV)/install.log)"
	@$(PYTHON) -m venv --clear $(VENV)
	@date +%s > $(VENV)/install.start
	@$(PIP) --editable '.[$(EXTRAS)]' > $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log >&2; exit 1; }
	@# Only the wheel's files are used; its own requirements (numpy < 2) are not.
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(PIP) --no-deps --target $(VENV)/share/hiertcn/triton nvidia-pytriton >> $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log >&2; exit 1; }; \
	else echo "no Triton wheel for this platform: serve with --triton-url of a running Triton"; fi
	@$(BIN)/python -c "import pathlib, time; p = pathlib.Path('$(VENV)'); (p / 'install.seconds').write_text(str(time.time() - int((p / 'install.start').read_text())))"
	@touch $@
	@echo "installed: $(BIN)/hiertcn"

demo: install  ## simulate a log (or EVENTS= ITEMS=), run the daily pipeline, serve, replay; KEEP=1 leaves it serving
	@$(BIN)/python -m pipelines.demo $(if $(EVENTS),--events '$(EVENTS)') $(if $(ITEMS),--items '$(ITEMS)') $(if $(KEEP),--keep) $(OPTIONS)

test: install  ## run every test
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: install  ## kill and load a sidecar for two hours, and report what was lost and how memory grew
	@$(BIN)/python -m benchmarks.soak --folder .serving_load --kills 50 --minutes 120

lint: install  ## check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

typecheck: install  ## mypy --strict on our packages
	@$(BIN)/mypy

format: install  ## rewrite the sources in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: install  ## regenerate the gRPC code from recommender.proto
	@$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. --grpc_python_out=. hiertcn/serving/recommender.proto

clean:  ## remove what the demo and the tools wrote (not .venv)
	@rm -rf .demo .serving_load .mypy_cache .ruff_cache .pytest_cache build dist
