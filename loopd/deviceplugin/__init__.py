"""The device plugin of Kubernetes: what the kubelet asks for a container, made with a directory grant of loopd's.

A program of its own, because it needs grpcio: gRPC's library has threads of its own and does not survive fork(2), and
the daemon forks. Python 3.11 and later.

Imports: cli, client, protocol.
Never: opens a loop device; keeps what it could ask loopd or the kubelet for.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``loopd-device-plugin``; the exit status."""
    from loopd.deviceplugin import process  # noqa: PLC0415  # `import loopd.deviceplugin` alone needs no grpcio

    return process.main(arguments)
