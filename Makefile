# The commands for people. Each target installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip's notices about its version and about root do not apply to a virtual environment.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# A second environment on top of the first one, with the oldest transformers that pyproject.toml allows.
FLOOR_VENV ?= $(VENV)-floor
FLOOR := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
FLOOR_TESTS := $(addprefix tests/test_,models_tokenizers.py models_hf.py parity.py data_prompts.py data_tokens.py \
	data_turns.py data_chat_templates.py data_conversations.py data_preferences.py config_prompts.py \
	rewards_learned.py)
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test test-slow test-floor lint bench clean

demo: $(VENV)/.installed
	$(BIN)/python experiments/grpo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m slow --numprocesses 2 --dist loadfile

test-floor: $(FLOOR_VENV)/.installed
	$(FLOOR_VENV)/bin/python -m pytest -q -m "not slow" --numprocesses 2 --dist loadfile $(FLOOR_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python experiments/bench/log_probs.py

clean:
	rm -rf $(VENV) $(FLOOR_VENV) .cache build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(FLOOR_VENV)/.installed: pyproject.toml $(VENV)/.installed-test
	rm -rf $(FLOOR_VENV)
	$(BIN)/python -m venv $(FLOOR_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(FLOOR_VENV)/bin/python $(PURELIB))/test.pth"
	$(FLOOR_VENV)/bin/python -m pip install --quiet "transformers==$(FLOOR)"
	touch $@
