"""Take a datagram off the queue with its fds, vet the sockets among them, and say what passed.

The main process goes on with the next datagram as soon as it hears `Taken`. Up to then nothing is done that can wait
for a client.
"""

from __future__ import annotations

from loopd.children.bugs import described
from loopd.kernel import cgroups, peers, transport
from loopd.kernel.transport import FdSet, Packet
from loopd.protocol import wire
from loopd.protocol.wire import Code, Refusal
from loopd.worker import files, messages, nodes
from loopd.worker.attach import Attaching, borrow
from loopd.worker.messages import (
    Change,
    Changed,
    Done,
    NumbersPlease,
    Recognised,
    Survey,
    Surveyed,
    Take,
    Taken,
    UseNumbers,
)
from loopd.worker.process import Worker


def take(worker: Worker, job: Take, own: FdSet) -> bool:
    """Take the head of the queue, and perform what the job says; whether the last answer was given."""
    packet = transport.take(worker.tools.listeners[job.listener])
    if packet is None:
        worker.say(Taken(messages.bug("the queue was empty"), False, False, ""), last=True)
        return True
    with packet.own, packet.fds:
        return _Taking(worker, job, packet, own).run()


class _Taking:
    """One datagram. `harmless` are the fds that can be closed without waiting."""

    def __init__(self, worker: Worker, job: Take, packet: Packet, own: FdSet) -> None:
        self._worker = worker
        self._grants = worker.tools.grants
        self._job = job
        self._packet = packet
        self._own = own
        self._harmless: set[int] = set()
        self._pidfd = packet.pidfd
        self._reply: int | None = None
        self._lease: int | None = None
        self._kept_by = ""
        self._grant = ""
        self._numbers: tuple[int, ...] = ()

    @property
    def _all_harmless(self) -> bool:
        return self._harmless.issuperset(self._packet.fds)

    def run(self) -> bool:
        refusal, granted = self._vet_sockets()
        self._harmless = {fd for fd in (self._reply, self._lease) if fd is not None}
        work = refusal is None and not (self._job.attach is None and self._job.grants is None)
        last = not work and not granted and self._all_harmless
        taken = Taken(refusal, self._pidfd is not None, self._reply is not None, self._kept_by, granted)
        self._worker.say(taken, (self._pidfd, self._reply, self._lease), last=last)
        if granted:
            refusal = self._recognise()
            work = work and refusal is None
            last = not work and self._all_harmless
            self._worker.say(Recognised(refusal, self._grant, self._numbers), last=last)
        return self._perform() if work else last

    # The sockets ------------------------------------------------------------------------------------------------------

    def _vet_sockets(self) -> tuple[Refusal | None, bool]:
        """Check the sockets that the main process answers on and watches. Returns the refusal, if any, and whether the
        datagram seems to have a directory of loopd's along.
        """
        refusal, granted = self._find_reply_socket(), False
        self._kept_by = "sender" if self._reply is None else "reply"
        try:
            self._pidfd = _living_sender(self._job, self._packet)
            if self._reply is not None:
                peers.check_maker(self._reply, self._packet.sender)
            if self._job.lease is not None:
                candidate = borrow(self._packet.fds, self._job.lease, "lease_fd")
                kind = peers.check_lease(candidate)
                if kind == "socket":
                    peers.seal(candidate, "lease_fd")
                self._kept_by, self._lease = kind, candidate
            if self._job.directory is not None:
                granted = self._grants.has(borrow(self._packet.fds, self._job.directory, "dir_fd"))
        except Refusal as error:
            refusal = refusal or error
        except ProcessLookupError:
            # The pid may be another process's by now, and the account that was read for it another tenant's.
            refusal = refusal or Refusal(Code.NOT_PERMITTED, "the sender has ended")
        except OSError as error:
            refusal = refusal or _unseen(error)
        return refusal, granted and refusal is None

    def _find_reply_socket(self) -> Refusal | None:
        """Find the reply socket. Returns a refusal where there should be one and is none."""
        index, refusal = self._job.reply, None
        fds = self._packet.fds
        for candidate in () if index is None else range(len(fds)) if index == messages.SEARCH else (index,):
            try:
                fd = borrow(fds, candidate, "reply_fd")
                peers.check_reply_socket(fd, self._packet.sender)
                peers.seal(fd, "reply_fd")
            except Refusal as error:
                refusal = error
            except OSError as error:
                refusal = Refusal(Code.BAD_FD, f"reply_fd: {error.strerror}")
            else:
                self._reply = fd
                return None
        return refusal

    def _recognise(self) -> Refusal | None:
        """Find out which directory of loopd's was sent along. A client may keep all of them locked, and this takes as
        long. The datagram is off the queue by now.
        """
        assert self._job.directory is not None
        try:
            self._grant = self._grants.recognise(self._packet.fds.borrow(self._job.directory))
            self._numbers = self._grants.numbers(self._grant) if self._grant else ()
        except Refusal as refusal:
            return refusal
        except OSError as error:
            return _unseen(error)
        return None

    # The files --------------------------------------------------------------------------------------------------------

    def _perform(self) -> bool:
        events = None
        try:
            if self._job.grants is not None:
                return self._look_after_grants(self._job.grants)
            events = self._open_events()
            last = self._attach(events)
        except Refusal as refusal:
            done = Done(refusal)
        except OSError as error:
            done = Done(_no_room(error))
        except Exception as error:  # noqa: BLE001  # the one boundary for bugs on this side
            done = Done(messages.bug(described(error)))
        else:
            return last
        last = self._all_harmless
        self._worker.say(done._replace(cgroup=_id(events)), (events,), last=last)
        return last

    def _look_after_grants(self, job: Change | Survey) -> bool:
        if not job.admin:
            assert self._pidfd is not None
            # In this order: the process that was looked at was the sender if the sender lives now.
            if not files.on_host(self._packet.sender.pid) or peers.ended(self._pidfd):
                raise Refusal(
                    Code.NOT_PERMITTED, "a directory is made from the host, and bound into the container from there"
                )
        answer: Changed | Surveyed
        if isinstance(job, Survey):
            answer = Surveyed(*self._grants.rows(job.uid, job.after))
        elif job.remove:
            answer = Changed(*self._grants.remove(job.uid, job.name))
        else:
            answer = Changed(*self._grants.create(job.uid, job.name, job.devices, self._reserve))
        last = self._all_harmless
        self._worker.say(answer, last=last)
        return last

    def _reserve(self, count: int) -> tuple[int, ...]:
        self._worker.say(NumbersPlease(count))
        answer = self._worker.hear()
        assert isinstance(answer, UseNumbers)
        if answer.refusal is not None:
            raise answer.refusal
        return answer.numbers

    def _attach(self, events: int | None) -> bool:
        keeper = {"reply": self._reply, "sender": self._pidfd}.get(self._kept_by, self._lease)
        fds = {"keeper": keeper, "reply": None if keeper == self._reply else self._reply, "cgroup": events}
        attaching = Attaching(self._worker, self._job, self._packet, self._pidfd, self._own.borrow(0))
        done, client = attaching.run(self._grant, self._kept_by, fds, self._numbers)
        with FdSet(client):
            self._harmless |= attaching.harmless
            last = self._all_harmless and not client
            self._worker.say(done._replace(cgroup=_id(events)), (events, *client), last=last)
        return last

    def _open_events(self) -> int | None:
        """The file that tells the end of the account, where there is one."""
        assert self._job.holder is not None
        assert self._pidfd is not None
        account, cgroup = self._job.holder["account"], self._job.holder["cgroup"]
        try:
            events = cgroups.open_events(account, cgroup, self._packet.sender.pid)
            if events is not None:
                self._packet.own.add(events)
                # Now: the process that was looked at was the sender if the sender lives.
                if not cgroup and peers.ended(self._pidfd):
                    raise cgroups.Gone
        except cgroups.Gone:
            # The process has moved to another cgroup since, or the name is another tenant's by now.
            raise Refusal(Code.NOT_PERMITTED, "the sender's cgroup has ended") from None
        return events


def _id(events: int | None) -> int:
    return 0 if events is None else cgroups.identity(events)


def _living_sender(job: Take, packet: Packet) -> int:
    """The sender's pidfd, where the packet is the one that was decided on; ProcessLookupError when it has ended."""
    if packet.payload != job.payload or packet.sender != job.sender:
        raise messages.bug("the head of the queue changed: somebody else reads this socket")
    if len(packet.fds) > wire.MAX_FDS:
        raise Refusal(Code.MALFORMED, f"more than {wire.MAX_FDS} fds")
    if packet.truncated:  # although there was room for all of them in the message
        raise Refusal(Code.NO_DEVICE, "loopd is at its limit of open files")
    pidfd = packet.pidfd
    if pidfd is None:  # before Linux 6.5
        pidfd = packet.own.add(transport.pidfd_of_sender(packet.sender.pid, packet.arrived))
    if peers.ended(pidfd):
        raise ProcessLookupError
    return pidfd


def _unseen(error: OSError) -> Refusal:
    """A client's fd that cannot be looked at."""
    if error.errno in nodes.NO_ROOM:
        return _no_room(error)
    return Refusal(Code.BAD_FD, f"an fd cannot be looked at: {error.strerror}")


def _no_room(error: OSError) -> Refusal:
    """A refusal where the host has no more of something; any other errno without a meaning is a bug."""
    if error.errno in nodes.NO_ROOM:
        return Refusal(Code.NO_DEVICE, f"loopd has no room for another device: {error.strerror}")
    return messages.bug(described(error))
