# What is to be handed out, in build/: packages, and the client in one file.
FOR_DEB = dh:debhelper dh_python3:dh-python dpkg-buildpackage:dpkg-dev rst2man:python3-docutils
FOR_RPM = rpmbuild:rpm rst2man:python3-docutils

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' loopd/__init__.py)
# What packages are built from.
SOURCES = LICENSE Makefile README.md docs loopd pyproject.toml systemd

.PHONY: deb rpm zipapp for-deb for-rpm
for-deb: NEEDED = $(FOR_DEB)
for-rpm: NEEDED = $(FOR_RPM)

# A copy of the sources, below $(1).
define copy_sources
rm -rf $(1) && mkdir -p $(1)/loopd-$(VERSION) && cp -R $(SOURCES) $(1)/loopd-$(VERSION) && \
    find $(1) -name __pycache__ -prune -exec rm -r {} +
endef

deb: for-deb
	$(call copy_sources,build/deb)
	cd build/deb/loopd-$(VERSION) && mv systemd/packaging/debian debian && \
	    printf '%s\n' 'loopd ($(VERSION)) unstable; urgency=medium' '' '  * New version.' '' \
	        " -- $$(sed -n 's/^Maintainer: //p' debian/control)  $$(date -Rr loopd/__init__.py)" >debian/changelog && \
	    dpkg-buildpackage --build=binary --unsigned-source --unsigned-changes --no-pre-clean >../build.log 2>&1 || \
	    { cat ../build.log >&2; exit 1; }
	rm -f build/*.deb && mv build/deb/loopd_$(VERSION)_all.deb build

rpm: for-rpm
	$(call copy_sources,build/rpm)
	tar --create --gzip --directory build/rpm --file build/rpm/loopd-$(VERSION).tar.gz loopd-$(VERSION)
	sed -e 's/@VERSION@/$(VERSION)/' -e "s/@DATE@/$$(LC_ALL=C date -r loopd/__init__.py '+%a %b %d %Y')/" \
	    systemd/packaging/loopd.spec >build/rpm/loopd.spec
	rpmbuild -bb --define '_topdir $(CURDIR)/build/rpm' --define '_sourcedir $(CURDIR)/build/rpm' \
	    --define 'packager loopd maintainers <maintainers@loopd.invalid>' build/rpm/loopd.spec >build/rpm/build.log 2>&1 || \
	    { cat build/rpm/build.log >&2; exit 1; }
	rm -f build/*.rpm && mv build/rpm/RPMS/noarch/loopd-$(VERSION)-1.noarch.rpm build

# Standard library only, Python 3.8 and later; to be bind-mounted into a container.
CLIENT = loopd/__init__.py $(wildcard loopd/cli/*.py loopd/client/*.py loopd/protocol/*.py)

zipapp:
	rm -rf build/zipapp
	for module in $(CLIENT); do install -D -m 644 $$module build/zipapp/$$module || exit; done
	printf '%s\n' 'import sys' 'from loopd.cli import main' 'sys.exit(main())' >build/zipapp/__main__.py
	$(PYTHON) -m zipapp --python '/usr/bin/env python3' --output build/loopctl --compress build/zipapp && chmod 755 build/loopctl
