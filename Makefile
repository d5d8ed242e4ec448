# make setup | demo | test | test-all | style      (Windows and notebooks: see README.md for the same by hand)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all style

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else f"Python {v[0]}.{v[1]}: 3.10 to 3.13 is needed. Name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || { echo "python3 has no venv module. Debian, Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/ready-to-test: .venv/ready
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

.venv/ready-to-test-all: .venv/ready-to-test
	$(BIN)/python -m pip install -e '.[test,test-all]'
	touch $@

# Starts afresh each time: the last demo's results, tokens and tokenizer go first.
demo: .venv/ready
	rm -rf outputs/wiki_zh_sample data/cache/sample_zh-*
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/wiki_zh_scratch.py --sample
	@echo
	@echo "Next:"
	@echo "  look      outputs/wiki_zh_sample/report.html"
	@echo "  generate  $(BIN)/python -c \"from transformers import pipeline; print(pipeline('text-generation', 'outputs/wiki_zh_sample')('地球是')[0]['generated_text'])\""
	@echo "  compare   $(BIN)/python -m common.run.compare outputs/wiki_zh_sample ANOTHER --output compare.html"
	@echo "  a GPU     $(BIN)/accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/wiki_zh_scratch.py"
	@echo "  your own  cp recipes/wiki_zh_scratch.py recipes/mine.py, then edit its three dicts"

test: .venv/ready-to-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not heavy' -n 2 --dist loadfile

test-all: .venv/ready-to-test-all
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not heavy' -n 2 --dist loadfile
	$(BIN)/python -m pytest -m heavy

style: .venv/ready-to-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
