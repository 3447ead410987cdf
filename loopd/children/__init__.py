"""Child processes: fork, channel, deadline, kill, reap.

Imports: kernel.
Never: knows what a child is for.
"""
