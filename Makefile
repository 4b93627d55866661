# The two commands that a newcomer needs: make train and make test.
#
# Each makes its own virtual environment, .venv, on first use, with the first
# Python of this list that is 3.10 to 3.13, and installs what setup.cfg asks
# for, once. make train PYTHON=/path/to/python takes another.

PYTHON := python3 python3.13 python3.12 python3.11 python3.10
VENV := .venv
WORKDIR := runs/resnet20_digits
EXPORT_DIR := exports/resnet20_digits
IMAGES := runs/test_digits
PYTEST_FLAGS :=
# Processes that share the tests, class by class: each has a TensorFlow.
TEST_PROCESSES := 2
PYTEST = $(VENV)/bin/python -m pytest --numprocesses=$(TEST_PROCESSES) \
	--dist=loadscope $(PYTEST_FLAGS)
# A client of TensorFlow Serving that is not ours, for the tests. What it asks
# for by itself are versions that TensorFlow does not go with.
SECOND_CLIENT := ovmsclient==2023.1

# What runs on every backend of Keras.
ANY_BACKEND := $(addprefix tests/,$(addsuffix _test.py,backends contract \
	jax_trainer layers models complexity propagation weights))

.PHONY: train test serving-check test-jax lint clean

train: $(VENV)/installed
	$(VENV)/bin/python -m apps.train --workdir=$(WORKDIR)
	$(VENV)/bin/python -m apps.evaluate --workdir=$(WORKDIR)
	$(VENV)/bin/python -m apps.export --workdir=$(WORKDIR) \
		--export_dir=$(EXPORT_DIR)
	$(VENV)/bin/python -c 'from keras_resnet import data; \
		data.write_examples(data.load("digits"), "$(IMAGES)", count=10)'
	$(VENV)/bin/python -m apps.predict --saved_model=$(EXPORT_DIR) --top=1 \
		$(IMAGES)/*.png
	@echo
	@echo "Trained in $(WORKDIR), exported to $(EXPORT_DIR)."
	@echo "To try next, after . $(VENV)/bin/activate:"
	@echo "  tensorboard --logdir=$(WORKDIR)"
	@echo "  python -m apps.train --model=resnet20v2"
	@echo "  python -m apps.train --model=plainnet56"
	@echo "  python -m apps.train --model=resnet56 --dataset=cifar10"
	@echo "  python -m apps.train --model=resnet50 --dataset=folder:PATH"
	@echo "  python -m apps.train --help"

test: $(VENV)/installed-dev
	$(PYTEST)

test-jax: $(VENV)/installed-jax
	KERAS_BACKEND=jax $(PYTEST) $(ANY_BACKEND)

# With Docker: the real TensorFlow Serving on what make train exported.
serving-check: $(VENV)/installed-dev
	.ci/serving_check $(VENV)/bin/python $(EXPORT_DIR) $(IMAGES)/*.png

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

# A pip as old as Python 3.10's takes many minutes to find versions that fit
# each other, so it is brought up to date first.
$(VENV)/installed: setup.cfg pyproject.toml
	@for python in $(PYTHON); do \
		if $$python -c 'import ensurepip, sys; \
			sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "make: Python 3.10 to 3.13 with ensurepip is needed, tried" \
		"$(PYTHON); name one: make PYTHON=/path/to/python" >&2; \
	exit 1
	$(VENV)/bin/python -m pip install --upgrade pip
	$(VENV)/bin/python -m pip install --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	$(VENV)/bin/python -m pip install --no-deps $(SECOND_CLIENT)
	@touch $@

$(VENV)/installed-jax: $(VENV)/installed-dev
	$(VENV)/bin/python -m pip install --editable '.[jax]'
	@touch $@
