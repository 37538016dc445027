# The verbs of the project. `make demo` and `make test` need only cargo, gcc and make; what else they
# want they install by apt where they can, and say where they cannot (scripts/deps.sh).

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# The program is linked statically (position-independent): of a command that takes a millisecond, the dynamic
# linker would take a third. RUSTFLAGS with a target named do not reach build scripts and macros, which cannot be.
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
VIMG := $(TARGET)/$(HOST)/release/vimg
BUILD := . scripts/openssl.sh static; \
	RUSTFLAGS="$$RUSTFLAGS -C target-feature=+crt-static" $(CARGO) build --release --target $(HOST) -p img-tool $$features
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(notdir $(basename $(wildcard fuzz/fuzz_targets/*.rs)))
# address, or none: nearly all of this is safe code, where panics are what there is to find.
FUZZ_SANITIZER ?= none

.PHONY: all build demo test boot-matrix v2v-matrix luks-boot p2v-lab bench bench-nbd lint fmt fuzz install uninstall clean help

all: build

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

build: ## the vimg binary, optimised
	$(BUILD)

demo: ## a tour with a real disk image, in the end booted
	@bash scripts/deps.sh demo
	$(BUILD)
	@bash scripts/demo.sh $(VIMG)

test: ## every test there is, the differential ones against qemu-img included
	@bash scripts/deps.sh test
	@bash scripts/samples.sh $(TARGET)/samples
	@bash scripts/test.sh

boot-matrix: ## every guest with every boot loader, good and broken, by both engines (a quarter of an hour)
	@bash scripts/deps.sh test
	@VIMG_BOOT_MATRIX=1 bash scripts/test.sh boot

v2v-matrix: ## guests of many shapes converted, checked and booted (GUESTS="name ..." for some of them; hours, 8 GB)
	@bash scripts/deps.sh test
	$(BUILD)
	@python3 scripts/v2v_matrix.py $(VIMG) $(TARGET)/v2v-matrix $(GUESTS)

luks-boot: ## a Debian with encrypted LVM is made, converted and booted (some minutes)
	@bash scripts/deps.sh test
	$(BUILD)
	@bash scripts/luks-boot.sh $(VIMG) $(TARGET)/luks-guest

p2v-lab: ## vimg p2v --snapshot of a machine that is written to, in the lab (ten minutes)
	@bash scripts/deps.sh lab
	$(BUILD)
	@bash scripts/p2v-lab.sh $(VIMG)

bench: ## vimg and qemu-img side by side (ROWS="name ..." for some of it)
	@bash scripts/deps.sh bench
	$(BUILD)
	@bash scripts/bench.sh $(VIMG) $(ROWS)
	@[ -n "$(ROWS)" ] || { bash scripts/v2v-guests.sh $(TARGET)/v2v-guests && python3 scripts/bench_v2v.py $(VIMG) $(TARGET)/v2v-guests; } || \
		echo "bench: no conversions without their guests"

bench-nbd: ## vimg serve, qemu-nbd and nbdkit side by side (WORDS="raw randread" for some of it)
	@bash scripts/deps.sh bench-nbd
	$(BUILD)
	@python3 scripts/bench_nbd.py $(VIMG) /dev/shm $(WORDS)

lint: ## formatting, clippy without warnings, documentation, licences
	@bash scripts/deps.sh lint
	$(CARGO) fmt --all --check
	. scripts/openssl.sh shared; $(CARGO) clippy --workspace --all-targets $$features -- -D warnings
	$(CARGO) clippy -p nbd-server --all-targets --no-default-features -- -D warnings
	. scripts/openssl.sh shared; RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet $$features
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny check bans licenses sources || exit 1; \
		$(CARGO) deny check advisories || echo "lint: advisories not checked, or there are some: see above"; \
	else echo "lint: cargo-deny is not installed; licences and advisories not checked"; fi

fmt: ## format everything
	$(CARGO) fmt --all
	cd fuzz && $(CARGO) fmt

# cargo-fuzz takes options of the compiler that are called unstable. RUSTC_BOOTSTRAP lets a stable compiler take them, too;
# what is built that way is thrown away. (libdeflate includes one of its sources twice, which the address sanitizer takes
# for a mistake.)
fuzz: ## each fuzz target for FUZZ_SECONDS (needs cargo-fuzz: cargo install cargo-fuzz)
	for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/corpus/$$target && \
		RUSTC_BOOTSTRAP=1 ASAN_OPTIONS=detect_odr_violation=0 $(CARGO) fuzz run -s $(FUZZ_SANITIZER) $$target \
			fuzz/corpus/$$target tests/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 -timeout=10 || exit 1; \
	done

# The man pages and completions are written by the program itself, from its own option tables.
install: build ## binary, man pages, completions, below PREFIX (and DESTDIR)
	install -Dm755 $(VIMG) $(DESTDIR)$(PREFIX)/bin/vimg
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	$(VIMG) man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(VIMG) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/vimg
	$(VIMG) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_vimg
	$(VIMG) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/vimg.fish

uninstall: ## what install has put there
	rm -f $(DESTDIR)$(PREFIX)/bin/vimg $(DESTDIR)$(PREFIX)/share/man/man1/vimg.1 \
		$(DESTDIR)$(PREFIX)/share/man/man1/vimg-*.1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/vimg \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_vimg \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/vimg.fish

clean: ## everything that was built
	$(CARGO) clean
	rm -rf fuzz/target fuzz/artifacts fuzz/coverage
