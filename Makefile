# Every target sets up what it needs: on a fresh clone `make test` alone is enough.
PYTHON ?= python3
export PYTHON
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-all families kernels test-gpu quality frontier calibration-tokens quality-real
.PHONY: picture compare-tables
.PHONY: bench bench-layer bench-against bench-mobe bench-server bench-peers bench-offline bench-stages bench-plan plan-hours roofline lint audit format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install everything into .venv (PYTHON=python3.12 picks the interpreter of a new one)
	@deploy/install.sh

lock: setup ## Renew the locked versions from pyproject.toml (ARGS=--upgrade: to the newest)
	@deploy/lock.sh $(ARGS)

demo: setup ## Compress the bundled model, serve it with vLLM, ask it something
	@.venv/bin/python examples/demo.py $(ARGS)

test: setup ## Fast test tier, by two workers (ARGS="-k name" for some of it)
	@.venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu and not families" $(ARGS)

test-all: setup ## Every test that needs no GPU; continues where it was interrupted
	@.venv/bin/python tests/run_all.py $(ARGS)

families: setup ## Every command, transformers and vLLM over every family's small model, for docs/methods.md (two hours)
	@.venv/bin/python tests/run_families.py $(ARGS)

kernels: setup ## Compile every Triton kernel for every GPU and dtype, without one; goes on where it was interrupted
	@.venv/bin/python tests/run_aot.py

test-gpu: setup ## The tests that need an NVIDIA GPU, and the layer benchmark on it
	@.venv/bin/python tests/run_gpu.py $(ARGS)

quality: setup ## Measure the tables of docs/quality.md anew (needs ../shared; 30 minutes)
	@.venv/bin/python benchmarks/quality.py

frontier: setup ## Measure the default at many sizes anew, for docs/quality.md (needs ../shared; an hour)
	@.venv/bin/python benchmarks/frontier.py $(ARGS)

calibration-tokens: setup ## Measure what the default loses over the calibration's tokens (needs ../shared; 40 minutes)
	@.venv/bin/python benchmarks/calibration_tokens.py $(ARGS)

quality-real: setup ## Measure a model with pretrained weights, upcycled here (needs ../shared and PyPI; three to five hours)
	@.venv/bin/python benchmarks/quality_real.py $(ARGS)

picture: setup ## Draw the README's picture anew from the tables of docs/quality.md
	@.venv/bin/python benchmarks/picture.py

compare-tables: setup ## Measure tables and pictures of docs/comparison.md anew (needs ../shared; four hours)
	@.venv/bin/python benchmarks/compare_models.py $(ARGS)

bench-layer: setup ## Time a layer on this CPU beside vLLM's dense one (ARGS="--shapes Mixtral-8x7B")
	@.venv/bin/python benchmarks/bench_layer.py $(ARGS)

bench-against: setup ## Time a layer on this CPU beside another commit's (ARGS="HEAD~1 --pairs 15")
	@.venv/bin/python benchmarks/bench_against.py $(ARGS)

bench-mobe: setup ## Time a layer of MoBE on this CPU beside the dense one (ARGS="--ratios 0.5")
	@.venv/bin/python benchmarks/bench_mobe.py $(ARGS)

bench-server: setup ## Time whole vLLM servers, dense beside compressed, on this CPU (ARGS="--ratios 0.6")
	@.venv/bin/python benchmarks/bench_server.py $(ARGS)

bench-peers: setup ## Time a layer computed in other ways: dense, as the paper's authors, decompressed (ARGS="--ratios 0.6")
	@.venv/bin/python benchmarks/bench_peers.py $(ARGS)

bench: ## The benchmarks of serving, one after another: layer, server, peers (an hour)
	@$(MAKE) bench-layer ARGS=
	@$(MAKE) bench-server ARGS=
	@$(MAKE) bench-peers ARGS=

bench-offline: setup ## Time merge, prune and factor at Mixtral's shapes beside the paper's recipe (ARGS="--experts 2")
	@.venv/bin/python benchmarks/bench_offline.py $(ARGS)

bench-stages: setup ## Time an expert's stages at Mixtral's shapes beside how they were done before (ARGS="--rows 4096")
	@.venv/bin/python benchmarks/bench_stages.py $(ARGS)

bench-plan: setup ## Compress layers of real models' shapes; time, memory and disk beside the plan (ARGS="--windows 1")
	@.venv/bin/python benchmarks/bench_plan.py $(ARGS)

plan-hours: setup ## Hours that real models would take on other machines, by arithmetic, for docs/performance.md
	@.venv/bin/python benchmarks/plan_hours.py

roofline: setup ## Predict a layer's time on GPUs from bytes and operations: no measurement
	@.venv/bin/python benchmarks/roofline.py

lint: setup ## Check style, formatting and types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

audit: setup ## Ask OSV about known vulnerabilities of every locked version (needs the internet)
	@.venv/bin/python deploy/audit.py $(ARGS)

format: setup ## Mend style and formatting
	@.venv/bin/ruff check --fix
	@.venv/bin/ruff format

clean: ## Remove build outputs and caches (keeps .venv)
	@rm -rf build dist *.egg-info deploy/cpu/build deploy/cpu/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
