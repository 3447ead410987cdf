"""The protocol: requests, replies and codes, decoded strictly and encoded. Pure data: no I/O, no state.

Shared by the daemon and the client. Standard library of Python 3.8 and later.

Imports: nothing of the package.
Never: looks at a file, a socket or the clock.
"""
