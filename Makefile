# SPDX-License-Identifier: LGPL-2.1-or-later
# On a fresh Debian as root `make demo` and `make test` set up all that they need; without root, `make deps` says what
# is missing. Downloads of the guests (kernels, tools) are kept in .cache, which `make clean` leaves alone.

# Debian's own interpreter where there is one: the size budget of the initramfs counts with it
PYTHON ?= $(or $(wildcard /usr/bin/python3),python3)
VENV := .venv
TESTS ?= tests

IN_VENV := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
CORE := guard/_core.abi3.so
CORE_SOURCES := cffi_build.py $(wildcard guard/csrc/*.[ch] capture/csrc/*.[ch])

# The C library: its sources, its name with the ABI's number, where it is built and where it goes
LIB_SOURCES := $(addprefix guard/csrc/,liboldmem_guard.c guardfile.c sum64.c bulk.c gate.c pageset.c corefile.c \
	tally.c sigbus.c physmem.c)
LIB_MAP := guard/csrc/liboldmem_guard.map
LIB_NAME := liboldmem_guard.so
LIB_CFLAGS := -std=gnu11 -Wall -Wextra -Werror -fPIC -fvisibility=hidden -Iinclude -pthread
LIB_OUT ?= build/lib
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
CFLAGS ?= -O2
VERSION = $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' capture/cli.py)

# WHAT=PACKAGE: a command or an absolute path, and the Debian package that has it
NEEDED := \
	gcc=gcc /usr/include/stdio.h=libc6-dev /usr/include/linux/fuse.h=linux-libc-dev \
	qemu-system-x86_64=qemu-system-x86 setpriv=util-linux dpkg-deb=dpkg tar=tar \
	/usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring \
	busybox=busybox-static zstd=zstd cpio=cpio readelf=binutils shellcheck=shellcheck

.PHONY: demo test lint bench s390x ddump fuzz lib install-lib sanitize deps venv fetch clean

# Crashes a guest under QEMU, captures it, shows what was saved and what was refused
demo: venv
	$(IN_VENV) -m tests.vm.demo

# One part of it: make test TESTS=tests/unit. Guests keep one processor busy, all other tests the other one
test: venv
	$(IN_VENV) -m pytest -n 2 --dist loadgroup $(TESTS)

lint: venv
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy --strict

# Ratios of speeds, requests and sizes
bench: venv
	$(IN_VENV) -m tests.bench

# Real s390x crashes under QEMU, byte for byte; the first time it builds two kernels. Some: make s390x RUNS="smp2 live"
s390x: venv
	$(IN_VENV) -m tests.s390x $(RUNS)

# Device dumps that drivers add while oldmem serves; the first time it builds two kernels
ddump: venv
	$(IN_VENV) -m tests.ddump $(RUNS)

# The guard for C programs; needs a C compiler, no Python
lib: $(LIB_OUT)/$(LIB_NAME)

$(LIB_OUT)/$(LIB_NAME): $(LIB_OUT)/$(LIB_NAME).0
	ln -sf $(LIB_NAME).0 $@

$(LIB_OUT)/$(LIB_NAME).0: $(LIB_SOURCES) $(LIB_MAP) $(wildcard guard/csrc/*.h) include/oldmem_guard.h
	mkdir -p $(@D)
	$(CC) $(CFLAGS) $(LIB_CFLAGS) -shared -Wl,-soname,$(LIB_NAME).0 -Wl,--version-script=$(LIB_MAP) -Wl,-z,defs \
		$(LDFLAGS) -o $@ $(LIB_SOURCES)

install-lib: lib
	install -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(PREFIX)/include
	install -m 755 $(LIB_OUT)/$(LIB_NAME).0 $(DESTDIR)$(LIBDIR)
	ln -sf $(LIB_NAME).0 $(DESTDIR)$(LIBDIR)/$(LIB_NAME)
	install -m 644 include/oldmem_guard.h $(DESTDIR)$(PREFIX)/include
	sed 's,@PREFIX@,$(PREFIX),; s,@LIBDIR@,$(LIBDIR),; s,@VERSION@,$(VERSION),' oldmem-guard.pc.in \
		>$(DESTDIR)$(LIBDIR)/pkgconfig/oldmem-guard.pc

# The C core and its tests once more with ASan and UBSan, with TSan, and under valgrind
sanitize: NEEDED += valgrind=valgrind
sanitize: venv
	$(IN_VENV) -m tests.c

# Whole machines with flipped bits, and lies about sizes at their full size
SECONDS = 600
fuzz: venv
	$(IN_VENV) -m tests.fuzz $(SECONDS)
	OLDMEM_FULL_SIZE=1 $(IN_VENV) -m pytest tests/fuzz/test_resource_lies.py

# What the guests are made of, once, for work without network
fetch: venv
	$(IN_VENV) -m tests.vm.harness.fetch

deps:
	@missing=; \
	for need in $(NEEDED); do \
		what=$${need%=*}; \
		command -v "$$what" >/dev/null 2>&1 || [ -e "$$what" ] || missing="$$missing $${need#*=}"; \
	done; \
	$(PYTHON) -c 'import ensurepip' >/dev/null 2>&1 || missing="$$missing python3-venv"; \
	header='import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; \
	$(PYTHON) -c "$$header" >/dev/null 2>&1 || missing="$$missing python3-dev"; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then \
		echo "missing:$$missing (names of Debian packages); as root: apt-get install$$missing" >&2; \
		exit 1; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -q update && apt-get -q install --yes --no-install-recommends $$missing

venv: $(CORE)

$(INSTALLED): pyproject.toml setup.py | deps
	$(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install --quiet --disable-pip-version-check -e '.[test,lint,check]'
	touch $@

# Installing builds the core too; this is for when only its sources have changed since
$(CORE): $(CORE_SOURCES) | $(INSTALLED)
	$(IN_VENV) -W ignore setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf $(VENV) $(CORE) guard/_core.c build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.cache/*' -prune -exec rm -rf {} +
