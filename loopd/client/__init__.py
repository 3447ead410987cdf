"""The client library: one exchange with the daemon, the errors, the delivered device. What ``import loopd`` offers.

Standard library of Python 3.8 and later, so that it can be carried into an old container.

Imports: protocol.
Never: needs a right that a container does not have.
"""
