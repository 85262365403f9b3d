# Short names for what the scripts do; all of them make .venv where it is missing. `make` alone lists them.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs wheel

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

quickstart: ## from raw text to two trained models and their comparison
	bash scripts/quickstart.sh

test: ## the checks and the tests
	bash scripts/test.sh

lint: ## the checks alone: pytest only prints its version
	bash scripts/test.sh --version

docs: ## the documentation as a site, into build/site/
	source scripts/environment.sh docs && mkdocs build --strict

wheel: ## sdist and wheel, into dist/
	source scripts/environment.sh dev && python -m build
