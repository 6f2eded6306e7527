# Everything starts from a fresh clone with Python 3.11 or newer, git and make.
# `make` alone lists what can be made.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help book check test lab mini grades slimming distillation replay evaluation metrics fuzz kills gpu full-smoke results-check lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp makes the environment once, and again when its lists of packages change.
.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kdc needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	@echo "Installing into .venv; the first time takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

book: .venv/.ready ## run every notebook at the quick budget and build the HTML book
	$(BIN)/python tools/book.py all $(if $(REPOSITORY),--repository "$(REPOSITORY)") $(if $(ADDRESS),--address "$(ADDRESS)")

check: .venv/.ready ## lint, spelling, types, and the quick tests that need no notebook, in minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/spelling.py
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not book and not long"

test: .venv/.ready ## all of check, every notebook at the quick budget, the strict book build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/spelling.py
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

lab: .venv/.ready ## open the notebooks in JupyterLab
	JUPYTER_CONFIG_PATH=tools/jupyter $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

# glibc gives large blocks back to the system after every step and faults them in again, which costs
# time in every training step on a CPU.
STUDIES := mini grades slimming distillation replay evaluation metrics
$(STUDIES): export MALLOC_MMAP_MAX_ = 0
$(STUDIES): export MALLOC_TRIM_THRESHOLD_ = 8000000000
mini: .venv/.ready ## train the embedded models from nothing and put them into the package (hours); DEVICE=cuda
	$(BIN)/python -m studies mini --install $(if $(DEVICE),--device $(DEVICE))

grades: .venv/.ready ## grade the embedded models again; PHOTOS=FOLDER adds the autoencoder on photographs
	$(BIN)/python -m studies mini grades $(if $(PHOTOS),--photos "$(PHOTOS)")

slimming: .venv/.ready ## measure the study of chapter 01 again, write its files of results/ (hours)
	$(BIN)/python -m studies slimming

distillation: .venv/.ready ## measure the studies of chapter 03 and appendix A3 again (hours)
	$(BIN)/python -m studies distillation

replay: .venv/.ready ## measure the study of chapters 04 and 05 again (hours); PHOTOS=FOLDER adds photographs
	$(BIN)/python -m studies replay
	$(if $(PHOTOS),$(BIN)/python -m studies replay photos --photos "$(PHOTOS)")

evaluation: .venv/.ready ## measure the studies of chapter 06 again (hours)
	$(BIN)/python -m studies evaluation

metrics: .venv/.ready ## hold the trial of the metrics, appendix A2, again (minutes)
	$(BIN)/python -m studies metrics

fuzz: .venv/.ready ## broken images, captions, checkpoints and arguments by the thousand (half an hour)
	$(BIN)/python -m tests.robustness.trials fuzz

kills: .venv/.ready ## kill and damage runs, and try every fault once found again (half an hour)
	$(BIN)/python -m tests.robustness.trials kills
	$(BIN)/python -m tests.robustness.trials damage
	$(BIN)/python -m tests.robustness.faults

gpu: .venv/.ready ## measure this project on one CUDA device, in eight minutes
	$(BIN)/python -m benchmarks.gpu $(if $(MINUTES),--minutes $(MINUTES))

full-smoke: .venv/.ready ## the whole way at full size on a CPU, random weights (15 minutes, 20 GB)
	$(BIN)/python -m benchmarks.full_smoke

results-check: .venv/.ready ## look at the provenance of every file of results/; fails where one has a fault
	$(BIN)/python -m tools.results

lock: ## write requirements.lock from the versions now in .venv
	$(BIN)/python -m pip install --quiet --no-deps -e .
	$(BIN)/python tools/lock.py > requirements.tmp
	mv requirements.tmp requirements.lock

clean: ## remove what was built; .venv stays
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
