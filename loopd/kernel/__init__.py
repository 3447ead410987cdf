"""Thin wrappers of the kernel: procfs, sysfs, cgroups, credentials, AF_UNIX sockets and fds, inotify, epoll.

Each file wraps one interface and decides nothing.

Imports: protocol.
Never: knows accounts, leases or policy.
"""
