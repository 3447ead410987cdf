# The tests in VMs (tests/vm/README.md). K=EXPR selects tests, as pytest's -k does; MACHINE=NAME another machine.
VM_PYTHON ?= python3
MACHINE ?= stable
MACHINES ?= oldstable,5.10,stable,newest
VM_PYTEST = LOOPD_TEST_REQUIRE_ALL=$${LOOPD_TEST_REQUIRE_ALL-1} $(VM_PYTHON) -m pytest -ra --durations=8 $(if $(K),-k "$(K)")

.PHONY: check-vm check-vm-all check-kernels vm-shell vm-image

check-vm check-vm-all:
	$(VM_PYTEST) tests/vm --vm-machines=$(MACHINE) $(if $(K)$(filter check-vm-all,$@),,-m "not exhaustive") $(AGAIN)

check-kernels:
	$(VM_PYTEST) tests/vm/test_vm.py --vm-machines=$(MACHINES) $(if $(K),,--vm-table=docs/kernels.md)

vm-shell:
	cd tests/vm && $(VM_PYTHON) -m harness shell $(MACHINE)

vm-image:
	cd tests/vm && $(VM_PYTHON) -m harness build $(MACHINE)
