"""The host's side of the VM tests: build an image, boot it, follow what its tests report."""
