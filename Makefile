# Everything a newcomer needs is one of these; each makes the environment first. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export REELRAY_HOME ?= $(CURDIR)/.reelray
unexport PYTHONDONTWRITEBYTECODE # some images set it: then every process compiles our modules again when it starts

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-15s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## make the environment in .venv

.PHONY: demo
demo: install ## start the service, render a video per endpoint through the queue, stop
	$(BIN)/reelray demo

.PHONY: demo-weights
demo-weights: install ## train the demo models again, at the lowest priority; hours on two cores, resumes where it was stopped
	$(BIN)/python -m engines.demo

.PHONY: serve
serve: install ## keep the service running on http://127.0.0.1:8000
	$(BIN)/reelray serve

.PHONY: test
test: install ## run the tests
	$(BIN)/pytest -n 3 --dist loadscope --no-loadscope-reorder

.PHONY: test-fast
test-fast: install ## run the quick tests, which need neither Ray nor a compiler
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow"

.PHONY: check
check: install ## lint, types, import directions, what the READMEs name; changes no file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py tests/test_readmes.py

.PHONY: fix
fix: install ## format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: install ## measure both models against diffusers and the service against the pipeline
	$(BIN)/python -m tests.load.bench_flops
	$(BIN)/python -m tests.load.bench_pipeline
	$(BIN)/python -m tests.load.bench_controlnext
	$(BIN)/python -m tests.load.bench_service

.PHONY: bench-queue
bench-queue: install ## measure submits, claims and status reads with 1,000 and 1,000,000 jobs waiting
	$(BIN)/python -m tests.load.bench_queue

.PHONY: bench-units
bench-units: install ## measure one job over two replicas, what the sampler costs on one, and jobs side by side
	$(BIN)/python -m tests.load.bench_units

.PHONY: bench-placement
bench-placement: install ## measure stages that share two cores against stages that have one each; cluster/README.md says how on GPUs
	$(BIN)/python -m tests.load.bench_placement --save

.PHONY: bench-callers
bench-callers: install ## measure how long one caller can stop a gateway's loop, and the memory he can take
	$(BIN)/python -m tests.load.bench_callers

.PHONY: bench-media
bench-media: install ## measure what decoding callers' files in a child process costs a job
	$(BIN)/python -m tests.load.bench_media

.PHONY: fuzz
fuzz: install ## send requests made up from our OpenAPI documents, EXAMPLES of each operation
	FUZZ_EXAMPLES=$(or $(EXAMPLES),300) $(BIN)/pytest --timeout 3600 tests/deployments/ingress/test_schema.py

.PHONY: bench-transfers
bench-transfers: install ## measure the memory that uploads and downloads of 1 GB cost a gateway; writes 20 GB to the disk
	$(BIN)/python -m tests.load.bench_transfers

.PHONY: bench-batch
bench-batch: install ## measure batch rendering: kills, throughput, memory of the driver, a Ray job
	$(BIN)/python -m tests.load.bench_batch

.PHONY: bench-streams
bench-streams: install ## measure 10,000 open status streams on one gateway process, and as many callers polling as it takes
	$(BIN)/python -m tests.load.bench_streams

.PHONY: bench-kernels
bench-kernels: install ## measure the kernels against PyTorch's at the models' shapes, and record it; needs a GPU
	$(BIN)/python -m kernels.bench

.PHONY: bench-gpu
bench-gpu: install ## measure kernels, UNets and jobs at full size, the most valuable first, within LIMIT seconds; needs a GPU
	$(BIN)/python -m engines.bench.within --limit $(or $(LIMIT),inf)

.PHONY: simulate
simulate: install ## compare the autoscaling with Serve's default one in a simulated cluster, on bursts, a day and 4,000 GPUs
	$(BIN)/python -W ignore -m tests.load.simulate --save

.PHONY: chaos
chaos: install ## kill, cancel and cut off at random under thousands of jobs, and count what is lost; twenty minutes
	$(BIN)/python -m tests.chaos --save
	$(BIN)/python -m tests.chaos.outages --save
	$(BIN)/python -m tests.chaos.cancels --save
	$(BIN)/python -W ignore -m tests.chaos.nodes --save
	$(BIN)/python -m tests.wire.lost_answers --save

.PHONY: clean
clean: ## remove the environment
	rm -rf $(VENV)
