# Two commands: `make quickstart` shows the whole path in a few minutes, `make test` checks it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOP := $(VENV)/.develop
# Without the compiled modules that Python keeps, every process of the tests would compile all that it imports again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --progress-bar on -c constraints.txt

# Makes the virtual environment and installs into it with pip, which names each package as it comes.
# $(call install,WHAT)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). The first time, some hundred megabytes are downloaded."
	@$(PIP) $(1) || { echo "If the package index is slow or cannot be reached, name a mirror:"; \
		echo "    PIP_INDEX_URL=https://MIRROR/simple make $(MAKECMDGOALS)"; exit 1; }
endef

.PHONY: quickstart test thorough test-cores metal-calls soak search bench lint format oracle audit fuzz clean

# NAME=小明 make quickstart: the assistant's name. WSL sets NAME to the name of the computer, which is not meant.
quickstart: $(INSTALLED)
	@name="$$NAME"; test "$$name" != "$$(uname -n)" || name=; \
	$(BIN)/python -m mlx_zh.run recipes/quickstart.yaml $${name:+"data.variables.name=\"$$name\""}

# Two test processes with one BLAS thread each use two cores better than one process with two threads.
test: $(DEVELOP)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not thorough"

# The tests that take long and repeat at length what the others cover.
thorough: $(DEVELOP)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m thorough
	$(BIN)/python tests/core_types.py --every

# The numeric tests with every matrix kernel of OpenBLAS that this processor can run, and with two threads.
test-cores: $(DEVELOP)
	$(BIN)/python tests/core_types.py

# Runs a recipe on a simulated Metal: what it asks of Metal, against what Metal refuses (docs/mac.md).
RECIPE ?= recipes/quickstart.yaml
metal-calls: $(DEVELOP)
	$(BIN)/python tests/metal_calls.py $(RECIPE) $(OPTIONS)

# Kills every stage again and again, and compares the result with an undisturbed run (docs/reliability.md).
soak: $(DEVELOP)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/soak.py

# Random configurations whose result may not depend on memory settings (docs/reliability.md). For example
# OPTIONS="--kinds dpo --seconds 600 --seed 7".
search: $(DEVELOP)
	OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests:tests/training:tests/models $(BIN)/python tests/search.py $(OPTIONS)

# Compares with other programs on the same samples, in turns (docs/performance.md). OPTIONS="--device gpu" goes to each
# script that compares steps. CEVAL is a folder with C-Eval's CSV files. Figures: benchmarks/results/*.json
bench: $(DEVELOP)
	$(BIN)/python -m pip install --quiet --no-deps mlx-lm-lora
	$(BIN)/python benchmarks/plan_accuracy.py --json benchmarks/results/plan_accuracy.json
	for name in sft_step dpo_step chat_turn growth limit; do \
		$(BIN)/python benchmarks/$$name.py $(OPTIONS) --json benchmarks/results/$$name.json || exit 1; done
	$(BIN)/python benchmarks/dpo_step.py $(OPTIONS) --checkpoint --json benchmarks/results/dpo_step_checkpointed.json
	test -n "$(OPTIONS)" || $(BIN)/python benchmarks/sft_step.py --model random-128k \
		--json benchmarks/results/sft_step_128k.json
	$(BIN)/python benchmarks/distributed.py --json benchmarks/results/distributed.json
	test -z "$(CEVAL)" || $(BIN)/python -m pip install --quiet lm_eval
	test -z "$(CEVAL)" || $(BIN)/python benchmarks/eval_speed.py $(OPTIONS) --ceval "$(CEVAL)" \
		--json benchmarks/results/eval_speed.json
	test ! -d ../shared/data || $(BIN)/python benchmarks/corpus.py speed --json benchmarks/results/corpus.json

lint: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEVELOP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installs PyTorch and PEFT, which some tests compare with; without them, these tests are skipped. Tests of GGUF files
# also compare with llama.cpp if llama-cpp-python is installed, which takes some minutes to build.
oracle: $(DEVELOP)
	$(BIN)/python -m pip install --no-compile --quiet torch==2.13.0 peft==0.21.2

# Looks for known vulnerabilities in the pinned versions. pip-audit stays out of the virtual environment.
audit: $(INSTALLED)
	@test -d .audit/pip_audit || $(BIN)/python -m pip install --quiet --target .audit pip-audit==2.10.1 || \
		echo "pip-audit could not be installed"
	@PYTHONPATH=.audit $(BIN)/python .ci/audit.py

# Ten minutes of mutated input for everything that reads files from others; not part of the tests. An input that fails
# is kept in .fuzz as crash-….
fuzz: $(DEVELOP)
	test -d .fuzz/atheris || $(BIN)/python -m pip install --quiet --no-deps --target .fuzz atheris==3.0.0
	for target in gguf recipe data template adapter safetensors parquet archive redaction \
		modelfile card chat; do \
		PYTHONPATH=.fuzz $(BIN)/python fuzz/parsers.py $$target -max_total_time=50 || exit 1; \
	done

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,-e .)
	@touch $@

# The program, and tools for those who change it: linter, type checker, test runner.
$(DEVELOP): pyproject.toml constraints.txt
	$(call install,-e '.[dev]')
	@touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
