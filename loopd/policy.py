"""Policy: what a client may do, and how much.

Owns every limit and its default; a Policy is a frozen value. Decides from facts it is given and looks at nothing itself.
"""

from __future__ import annotations

from typing import NamedTuple

from .files import ANSWERING


class Policy(NamedTuple):
    """What is allowed. Times in seconds."""

    idle_timeout: float = 30.0
    """After this long with nothing to hold the daemon exits; systemd keeps the socket."""
    reply_to_address: bool = False
    """Answer a request without reply_fd at the sender's address, although its network namespace cannot be established."""
    devices: int = 256
    """Devices of one account at once."""
    requests: int = 32
    """Requests of one account under way at once."""
    new_numbers: int = 256
    """Device numbers that one account may use up at once; beyond these it gets those again that it had before."""
    new_numbers_per_minute: float = 10.0
    """How fast an account may use up more: there are a million, and each then rests for 30 days."""
    number_wait: float = 5.0
    """How long an attach waits for one of its account's own numbers to come free."""
    stuck: int = 2
    """Helper processes that one account may have hanging before its requests are dropped unanswered."""
    request_timeout: float = 30.0
    """After this long a helper process that has not finished a request is written off."""
    file_systems: frozenset[str] = ANSWERING
    """Types of the file systems on which backing files and directories may lie."""
