# make demo   convert the checkpoint that comes with the project, and let it tell a story
# make test   run every test
# make check  lint, types and the import contract
# make bench  speed against mlx-lm, as ratios: the results page, conversion, fine-tuning
# make pages  tables and pictures of the examples' pages and of docs/results.md, from the records that lie beside them
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
MODEL  := build/classics

.PHONY: demo test check bench pages clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@mkdir -p build
	$(BIN)/elm-mlx convert examples/classics/checkpoint_average.pt $(MODEL) --tokenizer examples/classics/tokenizer.model --verify --overwrite
	$(BIN)/elm-mlx info $(MODEL)
	$(BIN)/elm-mlx generate $(MODEL) --prompt '"Where is the King?" asked Dorothy.' --max-tokens 200 --temp 0.6 --top-p 0.9 --seed 1
	@echo
	@echo "Now try: $(BIN)/elm-mlx chat $(MODEL)"

test: $(VENV)/.developing
	$(BIN)/python -m pytest --numprocesses auto --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.developing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.developing
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/memory.py

pages: $(VENV)/.developing
	for page in examples/*/page.py; do $(BIN)/python $$page || exit 1; done
	$(BIN)/python benchmarks/results.py --page

clean:
	rm -rf build $(VENV)
