# Each target sets up what it needs: as root on Debian 12 or 13 by itself, elsewhere it says what to install.
#
#   make demo         the whole way of one loop device into a sandbox and back, in half a minute
#   make check        what can be tested on this machine, with a sample of what takes long (root); K=EXPR for all that matches
#   make check-all    everything that can be tested on this machine
#   make fuzz         100,000 datagrams that no client sends, to a daemon that has others to serve (root); FUZZ=NUMBER
#   make bench        what it costs, beside a broker in C that does no more, and losetup (root, a quarter of an hour); BENCH=--help
#   make check-vm     the same promises on a real system, in a virtual machine; likewise a sample
#   make check-vm-all everything there
#   make man          the man pages, in build/man: man -l build/man/loopctl.1
#   make venv         .venv/bin/loopd, .venv/bin/loopctl and the tools for development
#   make install      for good; `systemctl enable --now loopd.socket` then starts it
#   make install-device-plugin  after that: a program of its own, for Kubernetes
#   make uninstall    takes it away again, all but configuration and state
#   make deb          build/loopd_VERSION_all.deb and python3-loopd, the library; for Debian 13 and later
#   make rpm          build/loopd-VERSION-1.noarch.rpm and python3-loopd
#   make zipapp       build/loopctl, the client as one file
#   make help         this list

PREFIX = /usr/local
DESTDIR =
# The interpreter that loopd runs on, named by its path: an environment's must not get in. loopctl runs on what is /usr/bin/python3
# wherever it is bound into.
PYTHON = /usr/bin/python3
VM_PYTHON = $(CURDIR)/.venv/bin/python

LIB = $(DESTDIR)$(PREFIX)/lib
MODULES = $(filter-out $(PLUGIN),$(wildcard loopd/*.py loopd/*/*.py)) loopd/py.typed
PROGRAMS = sbin/loopd:daemon bin/loopctl:cli
# Each is packed into one file that needs nothing of the package, to be bind-mounted alone, under the name of what it stands in for.
STAND_INS = losetup:losetup mountloop:mount kpartx:kpartx dmsetup:dmsetup partx:partx partx:partprobe
# Beware of the backslash: these words are for the shell.
SYSTEM = 00-loopd.rules:lib/udev/rules.d/00-loopd.rules loopd.catalog:lib/systemd/catalog/loopd.catalog \
	loopd-admin.socket:lib/systemd/system/loopd-admin.socket \
	loopd-admin@.socket:lib/systemd/system/loopd-admin@.socket \
	loopd-directory@.service:lib/systemd/system/loopd-directory@.service \
	loopd-metrics.service:lib/systemd/system/loopd-metrics.service \
	loopd-metrics.timer:lib/systemd/system/loopd-metrics.timer loopd.service:lib/systemd/system/loopd.service \
	loopd.service:lib/systemd/system/loopd@.service loopd.socket:lib/systemd/system/loopd.socket \
	loopd@.socket:lib/systemd/system/loopd@.socket run-loopd-dev.mount:lib/systemd/system/run-loopd\\x2ddev.mount \
	modprobe.conf:lib/modprobe.d/loopd.conf no-sys-admin.conf:share/doc/loopd/no-sys-admin.conf \
	selinux/loopd.cil:share/selinux/packages/loopd.cil selinux/selinux.conf:share/doc/loopd/selinux.conf \
	sysusers.conf:lib/sysusers.d/loopd.conf tmpfiles.conf:lib/tmpfiles.d/loopd.conf
COMPLETION = loopctl.bash:share/bash-completion/completions/loopctl loopctl.fish:share/fish/vendor_completions.d/loopctl.fish \
	loopctl.zsh:share/zsh/site-functions/_loopctl
MANUAL = $(patsubst docs/man/%.rst,build/man/%,$(wildcard docs/man/*.rst))
PAGES = $(foreach page,$(filter-out build/man/loopd-device-plugin.8,$(MANUAL)),$(page):share/man/man$(subst .,,$(suffix $(page)))/$(notdir $(page)))
# A program, or a module of $(PYTHON)'s, that a target cannot do without, and the Debian package that has it.
FOR_DEMO = e2fsck:e2fsprogs python3:python3 setpriv:util-linux systemd-socket-activate:systemd $(SYSTEMD_PYTHON)
SYSTEMD_PYTHON = systemd.daemon:python3-systemd
FOR_VENV = ensurepip:python3-venv venv:python3-venv $(SYSTEMD_PYTHON)
FOR_CHECK = $(FOR_DEMO) $(FOR_BENCH) $(FOR_DEB) $(FOR_RPM) bwrap:bubblewrap lintian:lintian mkfs.btrfs:btrfs-progs \
	mkfs.xfs:xfsprogs modprobe:kmod prometheus-node-exporter:prometheus-node-exporter rpmlint:rpmlint secilc:secilc sfdisk:fdisk strace:strace \
	udevadm:udev
FOR_BENCH = cc:build-essential fio:fio losetup:mount systemd-socket-activate:systemd

# A user's PATH has no sbin on Debian.
export PATH := $(PATH):/usr/sbin:/sbin

FUZZ = 100000

.PHONY: all help venv demo check check-all fuzz bench man install uninstall for-demo for-check for-bench for-venv
all: venv

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

for-demo: NEEDED = $(FOR_DEMO)
for-check: NEEDED = $(FOR_CHECK)
for-bench: NEEDED = $(FOR_BENCH)
for-venv: NEEDED = $(FOR_VENV)
for-demo for-check for-bench for-venv for-deb for-rpm:
	@missing=$$(for pair in $(NEEDED); do name=$${pair%:*}; command -v $$name >/dev/null || \
	    $(PYTHON) -Ic "import $$name" 2>/dev/null || echo $${pair#*:}; done); $(get_missing)

define get_missing
[ -z "$$missing" ] || { [ $$(id -u) = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing </dev/null >/dev/null; } || \
	{ echo "make: please install (Debian's names):" $$missing >&2; exit 1; }
endef

# systemd-python is the system's: the Python Package Index has no wheel of it. Of the system's packages the environment gets this
# one alone: with --system-site-packages pytest would load plugins of another version of it.
venv: .venv/ready
.venv/ready: pyproject.toml
	@$(MAKE) -s for-venv
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip --quiet --disable-pip-version-check install --editable '.[dev]'
	ln -s -t .venv/lib/python3*/site-packages "$$($(PYTHON) -Ic 'import systemd.daemon; print(systemd.__path__[0])')"
	touch $@

# One process for all pages: most of what one takes is the import.
man: $(MANUAL)
$(MANUAL) &: $(wildcard docs/man/*.rst)
	@missing=$$($(PYTHON) -c 'import docutils' 2>/dev/null || echo python3-docutils); $(get_missing)
	@mkdir -p build/man
	$(PYTHON) -c 'import sys; from docutils.core import publish_file as publish; [publish(source_path=page, \
	    destination_path=f"build/man/{page[9:-4]}", writer_name="manpage", \
	    settings_overrides={"report_level": 2, "halt_level": 2}) for page in sys.argv[1:]]' $^

demo: for-demo
	$(PYTHON) tests/demo.py

check check-all: venv for-check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/pytest $(if $(K),-k "$(K)",$(if $(filter check,$@),-m "not exhaustive")) $(AGAIN)

fuzz: venv for-check
	LOOPD_FUZZ_DATAGRAMS=$(FUZZ) .venv/bin/pytest tests/protocol/fuzz.py $(AGAIN)

bench: venv for-bench
	.venv/bin/python -c 'import matplotlib' 2>/dev/null || \
	    .venv/bin/pip --quiet --disable-pip-version-check install --editable '.[bench]'
	.venv/bin/python tests/bench/bench.py --output docs --plot $(BENCH)

check-vm check-vm-all check-kernels: venv deb rpm
-include tests/vm/vm.mk systemd/packaging/packages.mk

# Where the system's Python looks for modules below PREFIX; nothing, where it looks nowhere below it.
SITE = $(shell /usr/bin/python3 -Ic 'import site; print(*[path for path in site.getsitepackages() if path.startswith("$(PREFIX)/lib/")][:1])')
OURS = find $(LIB) -mindepth 3 -maxdepth 3 -path '*/python3*-packages/loopd' -type l -lname '*/loopd/loopd'

# Installs no package, and says what is left out or missing. The man pages come along where docutils is there; MANUAL= leaves them out.
# Without DESTDIR the running system is told. A daemon that runs is restarted, its leases stay; sockets are never restarted.
# Directories stay what they are: containers have them bind-mounted. `import loopd` finds the same modules by a link.
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'make: loopd needs Python 3.11 or later: make install PYTHON=/usr/bin/python3.X' >&2; exit 1; }
	[ ! -d $(LIB)/loopd ] || find $(LIB)/loopd ! -type d -delete
	for module in $(MODULES); do install -D -m 644 $$module $(LIB)/loopd/$$module || exit; done
	umask 022 && $(PYTHON) -m compileall -q -s '$(DESTDIR)' -p / $(LIB)/loopd
	@site=$(SITE) && if [ -e "$(DESTDIR)$$site/loopd" ] && [ ! -L "$(DESTDIR)$$site/loopd" ]; then \
	    echo "make: 'import loopd' is left out: something else of that name is in $$site" >&2; \
	elif [ -n "$$site" ]; then \
	    umask 022 && install -d $(DESTDIR)$$site && ln -srfT $(LIB)/loopd/loopd $(DESTDIR)$$site/loopd; \
	elif [ '$(origin SITE)' = file ]; then \
	    echo "make: 'import loopd' is left out: /usr/bin/python3 looks for modules nowhere below $(PREFIX)" >&2; \
	fi
	umask 022 && for pair in $(PROGRAMS); do \
	    program=$(DESTDIR)$(PREFIX)/$${pair%:*} && install -d $${program%/*} && \
	    case $$pair in bin/*) python=/usr/bin/python3 ;; *) python=$(PYTHON) ;; esac && \
	    printf '%s\n' "#!$$python -IS" 'import sys' 'sys.path.insert(0, "$(PREFIX)/lib/loopd")' \
	        'try:' "    from loopd.$${pair#*:} import main" \
	        'except ModuleNotFoundError as error:' '    if not (error.name or "").startswith("loopd"):' '        raise' \
	        "    sys.exit(\"$${program##*/}: its library is not here: bind $(PREFIX)/lib/loopd into the container, too\")" \
	        'sys.exit(main())' >$$program && chmod 755 $$program || exit; \
	done
	umask 022 && $(PYTHON) systemd/packaging/stand_ins.py $(LIB)/loopd/bin $(STAND_INS)
	for pair in $(COMPLETION); do \
	    install -D -m 644 systemd/completion/$${pair%:*} $(DESTDIR)$(PREFIX)/$${pair#*:} || exit; \
	done
ifneq ($(MANUAL),)
	@$(PYTHON) -Ic 'import docutils' 2>/dev/null || \
	    { echo 'make: the man pages are left out: they need python3-docutils' >&2; exit 0; } && \
	    $(MAKE) -s man && for pair in $(PAGES); do install -D -m 644 $${pair%:*} $(DESTDIR)$(PREFIX)/$${pair#*:} || exit; done
endif
	for pair in $(SYSTEM); do install -D -m 644 systemd/"$${pair%:*}" $(DESTDIR)$(PREFIX)/"$${pair#*:}" || exit; done
	sed -i 's|@PREFIX@|$(PREFIX)|' $(LIB)/systemd/system/loopd.service $(LIB)/systemd/system/loopd@.service \
	    $(LIB)/systemd/system/loopd-directory@.service $(LIB)/systemd/system/loopd-metrics.service
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then \
	    systemd-sysusers loopd.conf && systemd-tmpfiles --create loopd.conf && journalctl --update-catalog && \
	    { ! [ -S /run/udev/control ] || udevadm control --reload; } && \
	    systemctl daemon-reload && systemctl try-restart loopd.service 'loopd@*.service'; \
	fi
endif
	@$(PYTHON) -Ic 'import systemd.daemon' 2>/dev/null || echo 'make: missing: python3-systemd, without which loopd does not start' >&2

uninstall:
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then \
	    metrics=$$(systemctl is-active loopd-metrics.timer); \
	    for socket in /run/loopd-*/admin.sock; do \
	        [ ! -S "$$socket" ] || $(PREFIX)/bin/loopctl --socket "$$socket" --timeout 10 detach --all --force --wait 2 || :; \
	    done; \
	    systemctl disable --now loopd-device-plugin.service 2>/dev/null; \
	    systemctl stop 'loopd-directory@*.service'; \
	    systemctl disable --now loopd.socket loopd-admin.socket loopd-metrics.timer; \
	    systemctl disable loopd@.socket loopd-admin@.socket loopd-directory@.service; \
	    systemctl stop 'loopd@*.socket' 'loopd-admin@*.socket' loopd.service 'loopd@*.service' 'run-loopd\x2ddev.mount'; \
	    [ "$$metrics" != active ] || systemctl start loopd-metrics.service; \
	    systemctl clean --what=fdstore loopd.service 'loopd@*.service' 2>/dev/null || :; \
	fi
endif
	[ ! -d $(LIB) ] || $(OURS) -delete
	rm -rf $(LIB)/loopd
	rm -f $(PLUGIN_FILES) $(foreach pair,$(PROGRAMS),$(DESTDIR)$(PREFIX)/$(firstword $(subst :, ,$(pair)))) \
	    $(foreach pair,$(SYSTEM) $(COMPLETION) $(PAGES),$(DESTDIR)$(PREFIX)/$(lastword $(subst :, ,$(pair))))
	rmdir --ignore-fail-on-non-empty $(DESTDIR)$(PREFIX)/share/doc/loopd 2>/dev/null || :
ifeq ($(DESTDIR),)
	rm -rf /run/loopd /run/loopd-admin /run/loopd-*/sock /run/loopd-*/admin.sock /run/cdi/loopd-*.json
	rmdir --ignore-fail-on-non-empty /etc/loopd /run/loopd-* 2>/dev/null || :
	if [ -d /run/systemd/system ]; then \
	    systemctl daemon-reload && journalctl --update-catalog && { ! [ -S /run/udev/control ] || udevadm control --reload; }; \
	fi
	@echo "Left in place: the configuration in /etc/loopd, if any, the state in /var/lib/loopd, and the user and group loopd."
endif
