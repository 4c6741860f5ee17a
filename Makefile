# make demo    a small model answers three questions through the plugin
# make test    lint, types and all tests
# make setup   only what both need: .venv with vLLM for CPU and the plugin with its native kernels
# Each starts from what is there. Another Python: make PYTHON=python3.13 setup

PYTHON ?= python3
.DELETE_ON_ERROR:
.PHONY: setup demo test asan clean

setup: .venv/plugin.done

demo: setup
	.venv/bin/vllm-neuron-rmsq demo

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
asan: setup
	kernels/cpu/sanitize.sh $(CURDIR)/.venv/bin/python

clean:
	rm -rf .venv .cache build

.venv/vllm.done: .ci/setup .ci/constraints.txt
	.ci/setup $(PYTHON)
	touch $@

.venv/plugin.done: .venv/vllm.done pyproject.toml $(wildcard setup.py kernels/cpu/*)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
		--no-build-isolation --editable '.[dev]'
	touch $@
