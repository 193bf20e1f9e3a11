"""A line between rank 0 and each other rank, by which each notices at once that the other has ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

from alignment.ranks.place import LOCK, LOGS, LOST, Place

_GOODBYE = b"."
"""What rank 0 says as it ends in order; a rank that dies says nothing."""
_FOLLOWER_SECONDS = 2
"""How long a rank stays after rank 0 has died, so that a launcher notices rank 0 first."""
_LEADER_SECONDS = 5
"""How long rank 0 has to notice by itself that another rank has died: a collective fails, except one that hangs."""
_IDLE, _BETWEEN, _PROBES = 60, 20, 6
"""Seconds of silence, seconds between probes, and probes, after which a machine that says nothing counts as gone."""
_STOPS = (signal.SIGINT, signal.SIGTERM)
_STOP_SECONDS = 27
"""How long rank 0 may wait for another rank after it was told to stop: launchers kill after 30 seconds."""
_OWN_STOP_SECONDS = 8
"""The same where our own launcher kills after ten."""


class Lifeline:
    """Connections that are open as long as their processes live, each watched by a thread.

    A collective waits for as long as a rank may have nothing to do, which is hours. It fails where a process ends, but
    not where a whole machine does, and a rank that computes is in none. These connections tell at once of a process,
    and within three minutes of a machine.

    A rank that hangs cannot be told from one that computes. But Python obeys no signal within a collective, so where
    rank 0 waits for such a rank, the thread obeys in its place.

    Our own launcher has its ranks in sessions of their own, which outlive it if it is killed. Then rank 0 stops as by
    SIGTERM.

    Attributes:
        lost: the first rank that has died; None while all live.
    """

    lost: int | None = None
    _waits = 0
    """Waits of rank 0 for others that have begun, and those that have ended: odd within one."""

    def __init__(self, store: Any, place: Place, wait: timedelta) -> None:
        self._noticed = threading.Event()
        self._place = place
        self._lines: dict[int, socket.socket] = {}
        self._closing = threading.Event()
        self._meet(store, wait)
        self._wake, self._woken = os.pipe()
        self._signals, heard = socket.socketpair()
        heard.setblocking(False)
        if place.rank == 0 and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(heard.fileno(), warn_on_full_buffer=False)
        self._heard = heard
        for line in self._lines.values():
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _BETWEEN), ("TCP_KEEPCNT", _PROBES)):
                if hasattr(socket, name):
                    line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        os.register_at_fork(after_in_child=self._in_child)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="lifeline")
        self._thread.start()
        if place.rank == 0 and LOGS in os.environ:
            threading.Thread(target=self._outlive, daemon=True, name="launcher").start()

    def close(self) -> None:
        """End in order: the others are told, and nobody counts as lost."""
        self._closing.set()
        if self._place.rank == 0:
            for line in self._lines.values():
                with suppress(OSError):
                    line.sendall(_GOODBYE)
        os.write(self._woken, b".")
        self._thread.join()
        self._forget()
        if self._place.rank == 0 and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._signals.close()
        self._heard.close()
        os.close(self._wake)
        os.close(self._woken)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this rank 0 waits for others."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits += 1

    def _meet(self, store: Any, wait: timedelta) -> None:
        place = self._place
        if place.rank:
            host, port = store.get("lifeline").decode().rsplit(" ", 1)
            line = socket.create_connection((host, int(port)), timeout=wait.total_seconds())
            line.settimeout(None)
            line.sendall(place.rank.to_bytes(4, "big"))
            self._lines[0] = line
            return
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=place.size, dualstack_ipv6=both) as server:
            server.settimeout(wait.total_seconds())
            # the other ranks have reached this machine by that address
            store.set("lifeline", f"{os.environ['MASTER_ADDR']} {server.getsockname()[1]}")
            while len(self._lines) < place.size - 1:
                line, _ = server.accept()
                line.settimeout(wait.total_seconds())
                rank = int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big")
                line.settimeout(None)
                if 0 < rank < place.size:  # whatever else calls at a port of a cluster's machine
                    self._lines[rank] = line
                else:
                    line.close()

    def _watch(self) -> None:
        by_number = {line.fileno(): rank for rank, line in self._lines.items()}
        watched = select.poll()
        for number in (self._wake, self._signals.fileno(), *by_number):
            watched.register(number, select.POLLIN)
        while not (spoken := [number for number, _ in watched.poll() if number != self._signals.fileno()]):
            if not set(self._signals.recv(64)).isdisjoint(_STOPS):
                self._obey_later()
        if self._closing.is_set():
            return
        rank, said = by_number[spoken[0]], b""
        with suppress(OSError):
            said = self._lines[rank].recv(1)
        if said != _GOODBYE:
            self.lost = rank
            self._noticed.set()
        self._end()

    def _end(self) -> None:
        """End this process, unless it ends by itself."""
        if self._place.rank:
            if not self._closing.wait(_FOLLOWER_SECONDS):
                os._exit(0 if self.lost is None else 1)  # rank 0 has ended in order: it has said why
            return
        if self._closing.wait(_LEADER_SECONDS):
            return
        if LOGS not in os.environ:
            sys.stderr.write(f"\nError: {self.sentence()}\n")
            sys.stderr.flush()
        os._exit(LOST if LOGS in os.environ else 1)

    def _outlive(self) -> None:
        """Wait for what the launcher holds as long as it lives, and then stop."""
        with suppress(OSError), FileLock(Path(os.environ[LOGS]) / LOCK, poll_interval=1):
            if not self._closing.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    def _obey_later(self) -> None:
        """End this process if it still is in the same wait when the time for that is over."""
        seconds, waits = _OWN_STOP_SECONDS if LOGS in os.environ else _STOP_SECONDS, self._waits

        def obey() -> None:
            if waits % 2 and waits == self._waits:
                sys.stderr.write(
                    f"\nError: Told to stop, and another rank has not answered for {seconds} seconds: continue with "
                    f"resume=true.\n"
                )
                sys.stderr.flush()
                os._exit(1)

        later = threading.Timer(seconds, obey)
        later.daemon = True
        later.start()

    def sentence(self) -> str:
        """What is to be said of the rank that has died, by whoever then ends this process."""
        self._noticed.wait(1)  # a collective may have failed before the line was heard
        self._closing.set()
        which = "Another rank" if self.lost is None else f"Rank {self.lost}"
        return (
            f"{which} has ended in the midst of its work, killed or for want of main memory: see what its launcher "
            f"says, and continue with resume=true."
        )

    def _in_child(self) -> None:
        """In a copy of this process, whose lines would outlive it, and whose signals are others."""
        self._forget()
        signal.set_wakeup_fd(-1)

    def _forget(self) -> None:
        for line in self._lines.values():
            line.close()
