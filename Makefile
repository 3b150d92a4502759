# Each is enough on a fresh clone with Python 3.11 or newer:
#   make figures   execute every notebook in order, rewrite its outputs and figures/
#   make test      check the style, run the unit tests and run every notebook as a test
#   make quick     for people at work: the style and the tests of the core, in under a minute
#   make book      the notebooks, the manual and the reference as a website, in build/book
#   make book-test check that website in a browser; wants Chromium or Chrome
# PYTHON=python3.12 make ... picks the interpreter; L3_PRESET=laptop or gpu runs larger experiments.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# On two cores, two processes of one thread each are faster than one process of two.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal --durations=5

.PHONY: figures test quick gpu book book-test clean

figures: $(READY)
	$(BIN)/python -m l3paper.notebooks

test: $(READY)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(TEST) tests
	$(TEST) --nbmake notebooks

quick: $(READY)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(TEST) -m 'not slow' tests/test_allocation.py tests/test_layer.py tests/test_gpt.py tests/lookup/test_reference.py \
		tests/lookup/test_grouped.py tests/parts

# With an NVIDIA GPU: check, time and train there. PARTS="rivals --minutes 9" runs one part, for so long.
# GPU_PYTHON=python3 takes an interpreter that has a CUDA PyTorch already.
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(READY))
	$(GPU_PYTHON) -m l3paper.gpu $(PARTS)

book: .venv/.book
	rm -rf build/pages build/book
	mkdir -p build/pages
	$(BIN)/python -m sphinx -q -E -W --keep-going -c .book -d build/doctrees build/pages build/book
	@echo "the book is build/book/index.html"

book-test: book
	$(BIN)/python -m pytest .book/test_book.py

.venv/.book: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[pinned,book]'
	@touch $@

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) must be Python 3.11 or newer; name another with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[pinned]'
	@touch $@

clean:
	rm -rf .venv build
