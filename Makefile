# Every target sets up .venv by itself, once; it is renewed when pyproject.toml or constraints.txt change.
PYTHON ?= python3
CONFIG ?= ray_config.yaml
BIN := .venv/bin
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -rs $(ARGS)
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

# Without a target: the list of targets.
help: ## every target with its description
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: help kernels venv-vllm demo dpo real serve test test-all test-long lint bench format train page docs clean

demo: kernels ## the embedded trio, asked over HTTP in all four modes; ENGINE=vllm: the target on vLLM
	$(BIN)/python -m cluster.demo $(if $(ENGINE),--engine $(ENGINE)) $(ARGS)

dpo: kernels ## pairs from the embedded trio, a guider trained on them, and what that is worth
	$(BIN)/python -m cluster.demo.dpo $(ARGS)

real: kernels ## two published models of 135 and 270 million parameters: fetched once, evaluated in all modes
	$(BIN)/python -m cluster.real --fetch --evaluate $(ARGS)

serve: kernels ## the service of CONFIG=ray_config.yaml, until Ctrl-C; VERBOSE=1 shows Ray's log lines
	@$(BIN)/python -m cluster.serve $(CONFIG)

# One thread a process: the trio is so small that more would only wait for each other.
test test-all test-long: export OMP_NUM_THREADS = 1
test: kernels ## what a change must pass, in JOBS=2 processes
	$(PYTEST) -m "not slow"

test-all: kernels ## every test, those that are marked slow too; before a release
	$(PYTEST)

test-long: kernels ## 2,000 generated requests to each operation of the API, long suites of grammars, tests of vLLM
	API_CASES=2000 FORMAT_CASES=1000 HOSTILE_CASES=200 SCHEMA_CASES=300 $(PYTEST) tests/router/test_openapi.py \
		tests/router/test_fuzzed_formats.py tests/router/test_hostile_grammars.py tests/coordinator/test_schemas.py
	@if test -e .venv-vllm/ready; then .venv-vllm/bin/python -m pytest -W ignore -rs tests/vllm $(ARGS); \
		else echo "not run: the tests of tests/vllm, which need \`make venv-vllm\`"; fi

lint: .venv/ready ## format, lint rules and types, checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready ## format, and fix what the lint rules can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/ready ## the benchmarks; each prints a table and, last, one line of JSON
	$(BIN)/python -m benchmarks.effect
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.exchange
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.decode

train: .venv/ready ## rebuild the embedded trio from its seed
	$(BIN)/python -m cluster.demo.train

page: ## the playground with recorded answers as one file, build/playground.html; needs Python alone
	$(PYTHON) -m cluster.page

docs: .venv/ready page ## build the documentation's site, strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## remove .venv and .venv-vllm
	rm -rf .venv .venv-vllm

venv-vllm: .venv-vllm/ready ## an environment for roles with `engine: vllm`, on CPUs

# vLLM wants older versions of some packages than the service. Its torchvision, torchaudio and torchcodec are left out:
# they are for images and sound, and have no build beside torch for CPUs.
.venv-vllm/ready: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet --no-deps "torch==$$(sed -n 's/^torch==//p' constraints-vllm.txt)"
	.venv-vllm/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt ".[dev]"
	@# published tokenizers, of which nothing but the files is read; what needs them is skipped without
	-$(BIN)/pip install --quiet --no-deps dashscope==2.0.2 llama-models==0.3.0 mistral-common==1.13.1
	@# a client whose pins of its dependencies are older than ours; its test is skipped without
	-$(BIN)/pip install --quiet --no-deps instructor==1.17.0 docstring-parser==0.18.0
	touch $@

# Once, before many processes start at a time and would each do it.
kernels: .venv/ready ## compile the decoding kernels, if their source has changed
	@$(BIN)/python -m actors.warmup
