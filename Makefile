# `make test` and `make demo` install everything they need into $(VENV), with the versions pinned in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

RESULTS := benchmarks/results

.PHONY: help install test sweep sanitize image demo docs lint benchmark benchmark-head benchmark-step benchmark-trl benchmark-parallel benchmark-demo benchmark-pairs \
	benchmark-study benchmark-compile benchmark-gpu pairs-given tables clean
# Commands that are timed must not run beside others.
.NOTPARALLEL:

help:
	@echo "make demo        fit, sample, fine-tune and compare a tiny model (1 to 3 minutes, no GPU)"
	@echo "make test        run the tests, in two processes (WORKERS=N)"
	@echo "make sweep       run the slow tests: all architectures, compilers, whole benchmarks, kills"
	@echo "make sanitize    run the tests of the Triton kernels with every memory access checked (one minute, no GPU)"
	@echo "make image       run the package's tests with the versions of the GPU image (Python 3.12; installs 5 GB)"
	@echo "make lint        ruff and mypy"
	@echo "make docs        build the documentation as a site, in build/site"
	@echo "make benchmark PAIRS=FILE.jsonl"
	@echo "                 measure all tables and plots again (hours on two cores); or run single parts,"
	@echo "                 which continue after an interruption with RESUME=1:"
	@echo "  benchmark-head     the loss and the log-probs alone, and how they scale"
	@echo "  benchmark-step     whole training steps"
	@echo "  benchmark-trl      steps of TRL's trainer and of InSPOTrainer"
	@echo "  benchmark-parallel a head that is split over ranks"
	@echo "  benchmark-demo     the demo on ten seeds, and with a base fitted without drafts"
	@echo "  benchmark-pairs    objectives and the loop's overhead on the real pairs in PAIRS"
	@echo "  benchmark-study    all three studies in docs/; keeps finished runs"
	@echo "  benchmark-compile  compile the Triton kernels for GPUs that this machine does not have"
	@echo "  benchmark-gpu      needs a GPU, under ten minutes a call; not part of make benchmark"
	@echo "  tables             write tables and plots from the result files, without measuring"

install: $(VENV)/.installed-test

# The demo needs less than the tests: no Triton, no linters.
$(VENV)/.installed-%: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing what '$*' needs into $(VENV): some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

# loadfile runs the tests of a file in one process, in order, because they share fixtures that take seconds, such as a
# trained model. worksteal suits few files: a process that is done takes over tests that the other has not begun.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

test: install
	$(PYTEST) --dist loadfile

sweep: install
	$(PYTEST) --dist loadfile -m sweep

sanitize: install
	$(PYTEST) --dist worksteal --sanitize $(addprefix tests/inspo_kernels/test_,triton.py triton_kernels.py fused_pass.py gradients.py)

IMAGE := .venv-image
IMAGE_PYTHON ?= python3.12
IMAGE_TEST := $(IMAGE)/bin/python -m pytest tests/inspo_kernels -n $(WORKERS) --dist worksteal --timeout 300

# Run in two random orders, each distributed over two processes.
image: $(IMAGE)/.installed
	$(IMAGE_TEST) --shuffle 1
	$(IMAGE_TEST) --shuffle 2

$(IMAGE)/.installed: tests/image/requirements.txt
	@$(IMAGE_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "Python 3.12 is needed: make image IMAGE_PYTHON=FILE"; exit 1; }
	$(IMAGE_PYTHON) -m venv $(IMAGE)
	$(IMAGE)/bin/python -m pip install --quiet --requirement tests/image/requirements.txt
	@touch $@

demo: $(VENV)/.installed-training
	$(BIN)/python -m training.demo

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: install
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

# These are the commands that the result files name, in the same order: times on an idle machine first, then memory.
# A part starts over, unless RESUME=1 keeps the finished cells of its files after an interruption.
anew = $(if $(RESUME),,rm -f $(addprefix $(RESULTS)/,$(1)))
benchmark: pairs-given benchmark-head benchmark-step benchmark-trl benchmark-parallel benchmark-demo benchmark-pairs benchmark-study benchmark-compile tables

# Sections "loss", "logps" and "scaling", and the scaling plot.
LOGPS := --shape reference --contenders torch log_softmax compiled_log_softmax trl torch_linear_cross_entropy
benchmark-head: install
	$(call anew,loss_cpu.json logps_cpu.json scaling_cpu.json)
	$(BIN)/python -m benchmarks.loss --shape reference --rounds 5 --only time --resume --json $(RESULTS)/loss_cpu.json
	$(BIN)/python -m benchmarks.logps $(LOGPS) --rounds 3 --only time --resume --json $(RESULTS)/logps_cpu.json
	$(BIN)/python -m benchmarks.scaling --rounds 3 --only time --resume --json $(RESULTS)/scaling_cpu.json
	$(BIN)/python -m benchmarks.loss --shape reference --only memory --resume --json $(RESULTS)/loss_cpu.json
	$(BIN)/python -m benchmarks.logps $(LOGPS) --only memory --resume --json $(RESULTS)/logps_cpu.json
	$(BIN)/python -m benchmarks.scaling --only memory --resume --json $(RESULTS)/scaling_cpu.json

# Section "step" and its plot. The longest steps leave out TRL with its head at every position.
STEP := $(BIN)/python -m benchmarks.step
SHORT := --updates 1 --pairs 2 --tokens 384
LONG := --models trunk --shares real --contenders rows tree loop trl_compact four_forwards --updates 1 --pairs 4 --tokens 1024
benchmark-step: install
	$(call anew,step_cpu.json)
	$(STEP) --models small $(SHORT) --rounds 5 --only time --resume --json $(RESULTS)/step_cpu.json
	$(STEP) --models trunk --shares 0.1 0.9 $(SHORT) --rounds 3 --only time --resume --json $(RESULTS)/step_cpu.json
	$(STEP) $(LONG) --rounds 3 --only time --resume --json $(RESULTS)/step_cpu.json
	$(STEP) --models small --shares 0.5 real $(SHORT) --only memory --resume --json $(RESULTS)/step_cpu.json
	$(STEP) --models trunk --shares 0.9 $(SHORT) --only memory --resume --json $(RESULTS)/step_cpu.json
	$(STEP) $(LONG) --only memory --resume --json $(RESULTS)/step_cpu.json

# Section "trainers": a step of InSPOTrainer and of DPOTrainer on the same conditioned rows.
TRAINERS := --contenders trl_compact trainer_rows trainer --shares 0.5 --pairs 2 --tokens 384
benchmark-trl: install
	$(call anew,trl_step_cpu.json)
	$(STEP) $(TRAINERS) --updates 2 --rounds 3 --resume --json $(RESULTS)/trl_step_cpu.json

# Section "split_heads".
benchmark-parallel: install
	$(BIN)/python -m benchmarks.parallel --rounds 5 --json $(RESULTS)/parallel_cpu.json

# Sections "demo" and "no_drafts".
benchmark-demo: install
	$(call anew,demo_seeds.json demo_no_drafts.json)
	$(BIN)/python -m benchmarks.demo_seeds --json $(RESULTS)/demo_seeds.json
	$(BIN)/python -m benchmarks.demo_seeds --draft_share 0 --seeds 0 1 2 3 4 --json $(RESULTS)/demo_no_drafts.json

# Sections "real_pairs" and "loop_overhead". Their pairs are not part of the repository.
benchmark-pairs: pairs-given install
	$(BIN)/python -m benchmarks.real_pairs --pairs $(PAIRS) --json $(RESULTS)/real_pairs.json
	$(BIN)/python -m benchmarks.loop_overhead --pairs $(PAIRS) --steps 50 --rounds 3 --json $(RESULTS)/loop_overhead.json

pairs-given:
	@test -f "$(PAIRS)" || { echo "set PAIRS=FILE.jsonl, a file with prompt, chosen, rejected; or make only the parts that need no pairs"; exit 1; }

# Sections "study", "axis" and "code", the studies' pages in docs/ and their plots. No speed is measured, so finished runs
# in the .jsonl files of results/study, results/study_axis and results/study_code are kept. Remove these files to repeat the runs.
benchmark-study: install
	$(BIN)/python -m benchmarks.study.tabular --json $(RESULTS)/study_tabular.json
	$(BIN)/python -m benchmarks.study
	$(BIN)/python -m benchmarks.study.code_study --json $(RESULTS)/study_code/study_code.json

# Writes a result file only: no table is generated from it.
benchmark-compile: install
	$(BIN)/python -m benchmarks.compile_report --json $(RESULTS)/compile_report.json

# Section "gpu". The logs stay in runs/gpu.
benchmark-gpu: install
	$(BIN)/python -m benchmarks.gpu --out runs/gpu
	cp runs/gpu/gpu.json $(RESULTS)/gpu.json

tables: install
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) $(IMAGE) build dist *.egg-info
