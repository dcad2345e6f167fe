# One target a habit; .ci/run calls the same ones.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

T ?=
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Watch Keyward answer a real Envoy (needs Rust and Python only)
	@scripts/install-tools.sh envoy
	@cargo build --locked --quiet --bin keyward
	@python3 scripts/demo.py --keyward "$(abspath $(TARGET_DIR))/debug/keyward"

.PHONY: test
test: tools $(if $(T),,guard) ## Run all tests, or those whose name holds T: make test T=denials
	@if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --locked --no-fail-fast $(T); \
	else \
		cargo test --locked --no-fail-fast -- $(T); \
	fi

.PHONY: truth
truth: tools ## Prove the revocation bound: simulation, model, mutants, and three real replicas (N rounds: make truth ROUNDS=10)
	@KEYWARD_TRUTH_SEEDS=1000 KEYWARD_TRUTH_ROUNDS=$(or $(ROUNDS),4) \
		cargo test --locked --quiet --test it -- truth:: --nocapture --test-threads 1

.PHONY: faults
faults: tools ## Break everything around three replicas under load, judge all answers, write docs/reliability.md (FAULT="X3 X21", SEED=n)
	@KEYWARD_FAULTS="$(or $(FAULT),all)" $(if $(SEED),KEYWARD_FAULTS_SEED=$(SEED)) \
		$(if $(FAULT)$(SEED),,KEYWARD_FAULTS_WRITE="$$(date -u +%F), $$(nproc) shared cores, commit $$(git rev-parse --short HEAD): make faults") \
		cargo test --locked --quiet --test it -- faults::run --nocapture

.PHONY: sdk-test
sdk-test: ## Let the OpenAI, Anthropic and Google SDKs meet every refusal, through a real Envoy
	@scripts/install-tools.sh envoy postgres sdks
	@cargo test --locked --quiet --test it -- sdks:: --nocapture

.PHONY: roll
roll: tools ## Restart two replicas behind a real Envoy under load, and count the requests that fail (ROUNDS=n)
	@KEYWARD_ROLL_ROUNDS=$(or $(ROUNDS),4) \
		cargo test --locked --quiet --test it -- rolling:: --nocapture

.PHONY: manifests
manifests: ## Render every Kustomize overlay, hold the objects against their schemas, lint the Dockerfile
	@scripts/install-tools.sh envoy manifests
	@cargo test --locked --quiet --test it -- manifests:: --nocapture

.PHONY: lint
lint: ## Clippy, warnings denied
	@cargo clippy --locked --all-targets -- -D warnings

.PHONY: fmt
fmt: ## Format the code
	@cargo fmt

.PHONY: fmt-check
fmt-check: ## Fail where the code is not formatted
	@cargo fmt --check

.PHONY: bench
bench: ## Measure, and write docs/performance.md with its plots; or parts of it: make bench B="hot memory"
	@scripts/install-tools.sh envoy redis postgres h2load valgrind
	@cargo build --release --locked --bin keyward
	@python3 scripts/bench $(B)

.PHONY: junk
junk: ## Send keys that do not exist, each another one, and hold what memory they take (N=10000000)
	@cargo build --release --locked --bin keyward
	@python3 scripts/bench junk $(or $(N),10000000)

.PHONY: guard
guard: ## Fail where a hot check takes 5 % more instructions than recorded (a part of make test; RECORD=1 records it)
	@scripts/install-tools.sh h2load valgrind
	@cargo build --release --locked --bin keyward
	@python3 scripts/bench guard $(if $(RECORD),record)

.PHONY: timing
timing: ## Measure whether time tells an unknown key prefix from a wrong secret
	@cargo test --locked --quiet --test it -- one_answer::how_long --ignored --nocapture

.PHONY: supply
supply: ## Hold licences, sources, bans and known holes of all packages with cargo-deny (builds it: minutes)
	@scripts/install-tools.sh deny
	@.tools/bin/cargo-deny --locked check bans licenses sources
	@if .tools/bin/cargo-deny fetch db; then \
		.tools/bin/cargo-deny --locked check advisories; \
	else \
		echo "supply: THE ADVISORIES CAN'T BE REACHED AND WERE NOT ASKED; known holes are held by the list in deny.toml alone" >&2; \
	fi

.PHONY: sbom
sbom: ## Write a bill of materials (CycloneDX 1.6) of the program into target/
	@mkdir -p target
	@python3 scripts/sbom.py >target/keyward.cdx.json
	@echo target/keyward.cdx.json

.PHONY: mutants
mutants: ## Change the deciding code in every way and see a unit test notice: hours (F=src/domain/key.rs for one file)
	@scripts/install-tools.sh mutants
	@.tools/bin/cargo-mutants mutants --jobs 1 $(if $(F),--no-config --cargo-arg=--lib -f $(F))

.PHONY: fuzz
fuzz: ## Fuzz every reader of foreign bytes for a minute each (FOR=seconds, T=json_body for one, SANITIZER=address)
	@scripts/install-tools.sh fuzz
	@scripts/fuzz.py --seconds $(or $(FOR),60) --sanitizer $(or $(SANITIZER),none) $(T)

.PHONY: check
check: ## All that CI asks for
	@.ci/run

.PHONY: tools
tools: ## Install Envoy, Redis, PostgreSQL, PgBouncer, nginx, valgrind, h2load, promtool, kubectl and the SDKs where they are missing
	@scripts/install-tools.sh
