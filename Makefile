# make train and make test are the two commands for a newcomer.
#
# The first target that runs makes a virtual environment, .venv, with the first
# Python of this list that is 3.10 to 3.13, and installs the requirements of
# setup.cfg. make train PYTHON=/path/to/python uses another Python.

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
# The rooms whose modules the API reference describes, beside the public names.
API_ROOMS := $(addprefix keras_resnet.,analysis data papers serving training)
# A second client of TensorFlow Serving, for the tests. It is installed without
# its dependencies, because they contradict those of TensorFlow.
SECOND_CLIENT := ovmsclient==2023.1

# The tests of the parts that run on every backend of Keras.
ANY_BACKEND := $(addprefix tests/,$(addsuffix _test.py,backends contract \
	jax_trainer layers models complexity propagation weights))

.PHONY: train test test-all serving-check test-jax docs lint clean

# Ten test images as PNG files, without the lines that TensorFlow logs.
define WRITE_IMAGES
from apps import command_line
with command_line.quiet():
    from keras_resnet import data
    data.write_examples(data.load("digits"), "$(IMAGES)", count=10)
endef
export WRITE_IMAGES

train: $(VENV)/installed
	$(VENV)/bin/python -m apps.train --workdir=$(WORKDIR)
	$(VENV)/bin/python -m apps.evaluate --workdir=$(WORKDIR)
	$(VENV)/bin/python -m apps.export --workdir=$(WORKDIR) \
		--export_dir=$(EXPORT_DIR)
	@$(VENV)/bin/python -c "$$WRITE_IMAGES"
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

# Every law, in a few minutes.
test: $(VENV)/installed-dev
	$(PYTEST)

# Also the slow tests: whole programs that are killed, several workers, deep
# networks.
test-all: $(VENV)/installed-dev
	$(PYTEST) -m "not large"

test-jax: $(VENV)/installed-jax
	KERAS_BACKEND=jax $(PYTEST) $(ANY_BACKEND)

# Needs Docker: serves the export of make train with the real TensorFlow Serving.
serving-check: $(VENV)/installed-dev
	.ci/serving_check $(VENV)/bin/python $(EXPORT_DIR) $(IMAGES)/*.png

# build/docs gets the API reference, docs/flags.md the flags of the programs. A
# warning ends it.
docs: $(VENV)/installed-docs
	@mkdir -p build
	$(VENV)/bin/python docs/flags.py > build/flags.md
	mv build/flags.md docs/flags.md
	PDOC_ALLOW_EXEC=1 TF_CPP_MIN_LOG_LEVEL=3 $(VENV)/bin/python \
		-W error::UserWarning -m pdoc --docformat google \
		--output-directory build/docs keras_resnet $(API_ROOMS)
	@echo "build/docs/index.html is the API reference."

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

$(VENV)/installed-docs: $(VENV)/installed-dev
	$(VENV)/bin/python -m pip install --editable '.[docs]'
	@touch $@

$(VENV)/installed-jax: $(VENV)/installed-dev
	$(VENV)/bin/python -m pip install --editable '.[jax]'
	@touch $@
