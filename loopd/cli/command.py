"""The command of ``loopctl run``: start it, pass signals on to it, and wait for its end.

Changes when another signal is passed on, or none.
"""

from __future__ import annotations

import os
import signal

from loopd.cli.output import say


def run(argv: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; its exit status as a shell has it."""
    forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was ignored, the kernel would keep no status
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*forwarded, signal.SIGCHLD))
    try:
        try:
            # Python ignores these two signals, and the command would inherit that.
            ignored = (signal.SIGPIPE, signal.SIGXFSZ)
            pid = os.posix_spawnp(argv[0], argv, environment, setsigmask=mask, setsigdef=ignored)
        except OSError as error:
            say(f"{argv[0]}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        while True:
            info = signal.sigwaitinfo((*forwarded, signal.SIGCHLD))
            if info.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            # The kernel sends the signal of ^C to the whole foreground process group, the command included. It sends
            # the SIGHUP of a terminal that is gone to the session's leader alone, so that one is passed on.
            elif info.si_code <= 0 or info.si_signo == signal.SIGHUP:
                os.kill(pid, info.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
