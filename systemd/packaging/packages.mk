# What is to be handed out, in build/: packages, and the client in one file.
FOR_DEB = dh:debhelper dh_python3:dh-python dpkg-buildpackage:dpkg-dev docutils:python3-docutils $(SYSTEMD_PYTHON)
FOR_RPM = rpmbuild:rpm docutils:python3-docutils $(SYSTEMD_PYTHON)

# What packages are built from.
SOURCES = LICENSE Makefile README.md docs loopd pyproject.toml systemd
# In a clone, what is built later upgrades what was built before: 0.1.0+git20261129143005.abcdef0, by the time of the commit, or of
# now where something is changed. Found out once, where it is needed.
VERSION = $(eval VERSION := $(shell $(find_version)))$(VERSION)
define find_version
version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' loopd/__init__.py); \
if [ -e .git ] && commit=$$(git rev-parse --short=7 HEAD 2>/dev/null); then \
    if [ -n "$$(git status --porcelain -- $(SOURCES))" ]; then time=$$(date -u +%Y%m%d%H%M%S); \
    else time=$$(TZ=UTC git log -1 --format=%cd --date=format-local:%Y%m%d%H%M%S); fi; \
    [ "$$(git tag --points-at HEAD --list "v$$version")" ] || version=$$version+git$$time.$$commit; \
fi; \
echo $$version
endef

.PHONY: deb rpm zipapp install-library install-device-plugin for-deb for-rpm
for-deb: NEEDED = $(FOR_DEB)
for-rpm: NEEDED = $(FOR_RPM)

# A copy of the sources, below $(1).
define copy_sources
rm -rf $(1) && mkdir -p $(1)/loopd-$(VERSION) && cp -R $(SOURCES) $(1)/loopd-$(VERSION) && \
    find $(1) -name __pycache__ -prune -exec rm -r {} + && \
    sed -i 's/^__version__ = .*/__version__ = "$(VERSION)"/' $(1)/loopd-$(VERSION)/loopd/__init__.py
endef

# The public modules, which need no other of the package: python3-loopd. /usr/lib/loopd stays whole without it, because containers have
# that folder bind-mounted: a link from there to SITE would lead nowhere in them.
LIBRARY = loopd/__init__.py loopd/loop.py loopd/py.typed $(wildcard loopd/client/*.py loopd/protocol/*.py)

install-library:
	for module in $(LIBRARY); do install -D -m 644 $$module $(DESTDIR)$(SITE)/$$module || exit; done
	umask 022 && $(PYTHON) -m compileall -q -s '$(DESTDIR)' -p / $(DESTDIR)$(SITE)/loopd

# A package of its own, for it needs python3-grpcio. Its modules lie beside those of loopd, which they need.
PLUGIN = $(wildcard loopd/deviceplugin/*.py)
PLUGIN_FILES = $(DESTDIR)$(PREFIX)/sbin/loopd-device-plugin $(LIB)/systemd/system/loopd-device-plugin.service \
	$(DESTDIR)$(PREFIX)/share/man/man8/loopd-device-plugin.8

install-device-plugin:
	for module in $(PLUGIN); do install -D -m 644 $$module $(LIB)/loopd/$$module || exit; done
	umask 022 && $(PYTHON) -m compileall -q -s '$(DESTDIR)' -p / $(LIB)/loopd/loopd/deviceplugin
	umask 022 && install -d $(DESTDIR)$(PREFIX)/sbin && program=$(DESTDIR)$(PREFIX)/sbin/loopd-device-plugin && \
	    printf '%s\n' '#!$(PYTHON) -I' 'import sys' 'sys.path.insert(0, "$(PREFIX)/lib/loopd")' \
	        'from loopd.deviceplugin import main' 'sys.exit(main())' >$$program && chmod 755 $$program
	install -D -m 644 systemd/loopd-device-plugin.service $(LIB)/systemd/system/loopd-device-plugin.service
	sed -i 's|@PREFIX@|$(PREFIX)|' $(LIB)/systemd/system/loopd-device-plugin.service
ifneq ($(MANUAL),)
	@! $(PYTHON) -Ic 'import docutils' 2>/dev/null || { $(MAKE) -s man && \
	    install -D -m 644 build/man/loopd-device-plugin.8 $(DESTDIR)$(PREFIX)/share/man/man8/loopd-device-plugin.8; }
endif
ifeq ($(DESTDIR),)
	[ ! -d /run/systemd/system ] || { systemctl daemon-reload && systemctl try-restart loopd-device-plugin.service; }
endif
	@$(PYTHON) -Ic 'import grpc' 2>/dev/null || echo 'make: missing: python3-grpcio, without which it does not start' >&2

deb: for-deb
	$(call copy_sources,build/deb)
	cd build/deb/loopd-$(VERSION) && mv systemd/packaging/debian debian && \
	    printf '%s\n' 'loopd ($(VERSION)) unstable; urgency=medium' '' '  * New version.' '' \
	        " -- $$(sed -n 's/^Maintainer: //p' debian/control)  $$(date -Rr loopd/__init__.py)" >debian/changelog && \
	    dpkg-buildpackage --build=binary --no-check-builddeps --unsigned-source --unsigned-changes --no-pre-clean >../build.log 2>&1 || \
	    { cat ../build.log >&2; exit 1; }
	rm -f build/*.deb && mv build/deb/*_$(VERSION)_all.deb build

rpm: for-rpm
	$(call copy_sources,build/rpm)
	tar --create --gzip --directory build/rpm --file build/rpm/loopd-$(VERSION).tar.gz loopd-$(VERSION)
	sed -e 's/@VERSION@/$(VERSION)/' -e "s/@DATE@/$$(LC_ALL=C date -r loopd/__init__.py '+%a %b %d %Y')/" \
	    systemd/packaging/loopd.spec >build/rpm/loopd.spec
	rpmbuild -bb $(if $(shell command -v dpkg),--nodeps) --define '_topdir $(CURDIR)/build/rpm' --define '_sourcedir $(CURDIR)/build/rpm' \
	    --define 'packager loopd maintainers <maintainers@loopd.invalid>' build/rpm/loopd.spec >build/rpm/build.log 2>&1 || \
	    { cat build/rpm/build.log >&2; exit 1; }
	rm -f build/*.rpm && mv build/rpm/RPMS/noarch/*-$(VERSION)-1*.noarch.rpm build

# Standard library only, Python 3.8 and later; to be bind-mounted into a container.
CLIENT = loopd/__init__.py $(wildcard loopd/cli/*.py loopd/client/*.py loopd/protocol/*.py)

zipapp:
	rm -rf build/zipapp
	for module in $(CLIENT); do install -D -m 644 $$module build/zipapp/$$module || exit; done
	printf '%s\n' 'import sys' 'from loopd.cli import main' 'sys.exit(main())' >build/zipapp/__main__.py
	$(PYTHON) -m zipapp --python '/usr/bin/env python3' --output build/loopctl --compress build/zipapp && chmod 755 build/loopctl
