"""A heartbeat between the ranks of a run. MLX's collectives may wait for ever for a rank that is gone.

Every other rank holds one TCP connection to rank 0. Both ends send a message twice a second. When a connection
closes, or is silent for `PATIENCE` seconds, the process ends with an error that names the rank, and rank 0 ends the
others.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from mlx_zh.errors import DistributedError

INTERVAL, PATIENCE = 0.5, 30.0  # seconds
Peers = dict[int, tuple[str, socket.socket]]  # host name and connection, by rank
TOLD_AFTER = 5.0  # seconds of waiting before it is said for whom
_CONNECT_SECONDS = 5.0
_STRANGERS, _LONGEST = 64, 1000  # connections that have not said who they are, and bytes of what they say
_ALIVE, _LEAVING, _LOST, _END = b"alive", b"leaving", b"lost", b"end"  # messages, one a line


class Listener:
    """The socket on which rank 0 accepts the other ranks.

    `key` is what they pass to `connect`: port, secret and addresses. `host` is the address at which MLX reaches
    rank 0, or empty. In a ring of cables only the neighbours reach that address, so `key` has the other addresses of
    this machine too.
    """

    def __init__(self, host: str) -> None:
        loopback = host.startswith("127.")
        self._socket = socket.create_server((host if loopback else "", 0))
        self._secret = secrets.token_hex(16)
        hosts = [host] if loopback else list(dict.fromkeys([host, *_addresses()]))
        self.key = " ".join([str(self._socket.getsockname()[1]), self._secret, *filter(None, hosts)])

    def accept(self, ranks: Collection[int], waiting: Callable[[list[int]], None] = lambda _: None) -> Peers:
        """Accept these ranks. Whoever else connects is sent away and ends nothing.

        `waiting` is called once with the ranks that have not connected after `TOLD_AFTER` seconds. Raises
        DistributedError when they have not within `PATIENCE` seconds.
        """
        peers: Peers = {}
        strangers: dict[socket.socket, bytes] = {}  # connections that have not said who they are: what was received
        begun, told = time.monotonic(), False
        self._socket.setblocking(False)
        try:
            while missing := sorted(set(ranks) - peers.keys()):
                seconds = time.monotonic() - begun
                if seconds > PATIENCE:
                    for _, connection in peers.values():
                        connection.close()
                    raise DistributedError(
                        f"rank {', '.join(map(str, missing))} of {len(ranks) + 1} ranks did not connect to rank 0 "
                        f"within {PATIENCE:.0f} s. Check the network between the machines and start the run again."
                    )
                if seconds > TOLD_AFTER and not told:
                    told = True
                    waiting(missing)
                ready, _, _ = select.select([self._socket, *strangers], [], [], INTERVAL)
                for connection in ready:
                    if connection is self._socket:
                        self._admit(strangers)
                    else:
                        self._introduce(connection, strangers, peers, missing)
        finally:
            self._socket.close()
            for connection in strangers:
                connection.close()
        return peers

    def _admit(self, strangers: dict[socket.socket, bytes]) -> None:
        """Take a new connection; of too many, the oldest is closed."""
        with suppress(OSError):  # it was closed meanwhile
            connection, _ = self._socket.accept()
            connection.setblocking(False)
            strangers[connection] = b""
        if len(strangers) > _STRANGERS:
            oldest = next(iter(strangers))
            del strangers[oldest]
            oldest.close()

    def _introduce(
        self, connection: socket.socket, strangers: dict[socket.socket, bytes], peers: Peers, missing: Collection[int]
    ) -> None:
        """Read what a connection sends; a missing rank becomes a peer, anything else is closed."""
        try:
            received = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        line, end, _ = (strangers.pop(connection) + received).partition(b"\n")
        if received and not end and len(line) < _LONGEST:
            strangers[connection] = line
            return
        secret, _, rest = line.decode(errors="replace").partition(" ")
        rank, _, name = rest.partition(" ")
        known = end and secrets.compare_digest(secret.encode(), self._secret.encode())
        if known and rank.isascii() and rank.isdigit() and int(rank) in missing and int(rank) not in peers:
            peers[int(rank)] = name.strip(), connection
        else:
            connection.close()


def connect(key: str, rank: int) -> Peers:
    """Connect to rank 0 at the first of its addresses that answers; returns no peer when none answers."""
    port, secret, *hosts = key.split(" ")
    for host in hosts:
        with suppress(OSError):
            connection = socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS)
            connection.sendall(f"{secret} {rank} {socket.gethostname()}\n".encode())
            return {0: (host, connection)}
    return {}


def _addresses() -> list[str]:
    """Addresses and names at which other machines may reach this one."""
    name = socket.gethostname()
    addresses = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # sends nothing, but selects the outward network interface
        addresses.append(str(outward.getsockname()[0]))
    return [*addresses, name, f"{name}.local"]


def exit_now(text: str) -> None:
    """Print `text`, if any, as an error and end the process, even while other threads wait in MLX."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        if text:
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
    os._exit(2)


class Heartbeat:
    """Watches the connections to `peers` in a thread of its own.

    `lost` is called with an error message when a rank is gone; the message is empty where rank 0 reports it.
    """

    def __init__(self, peers: Peers, lost: Callable[[str], None] = exit_now) -> None:
        self._lost = lost
        self._names = {peer: name for peer, (name, _) in peers.items()}
        self._connections = {peer: connection for peer, (_, connection) in peers.items()}
        self._closing = threading.Event()
        for connection in self._connections.values():
            connection.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and tell the other ranks that this one ends normally."""
        self._closing.set()
        self._thread.join()
        self._send(_LEAVING)
        for connection in self._connections.values():
            connection.close()

    def _watch(self) -> None:
        due = time.monotonic()
        last_heard = dict.fromkeys(self._connections, due)
        unread = dict.fromkeys(self._connections, b"")  # the beginning of a line
        looked = due
        while not self._closing.is_set() and self._connections:
            if time.monotonic() >= due:  # not after every read: two ranks would answer each other for ever
                self._send(_ALIVE)
                due = time.monotonic() + INTERVAL
            timeout = max(0.0, due - time.monotonic())
            ready, _, _ = select.select(list(self._connections.values()), [], [], timeout)
            if time.monotonic() - looked > INTERVAL + PATIENCE / 2:  # this process stood still, as after Ctrl-Z
                last_heard = dict.fromkeys(self._connections, time.monotonic())
            looked = time.monotonic()
            for peer, connection in list(self._connections.items()):
                if connection in ready:
                    last_heard[peer] = time.monotonic()
                    *lines, unread[peer] = (unread[peer] + _read(connection)).split(b"\n")
                    self._handle(peer, lines)
                elif time.monotonic() - last_heard[peer] > PATIENCE:
                    self._report_lost(peer, f"nothing was heard of it for {PATIENCE:.0f} s")

    def _handle(self, peer: int, lines: list[bytes]) -> None:
        for line in lines:
            if line == _LEAVING:
                return self._connections.pop(peer).close()
            if line == _LOST:  # rank 0 has printed the error
                self._connections.pop(peer).close()
                return self._lost("")
            if line == _END:
                return self._report_lost(peer, "its process has ended")

    def _report_lost(self, peer: int, reason: str) -> None:
        self._connections.pop(peer).close()
        self._send(_LOST)
        time.sleep(INTERVAL / 2)  # the others read the message before this process ends
        self._lost(
            f"rank {peer} ({self._names[peer]}) is gone: {reason}. All ranks stop. Checkpoints are kept; run the "
            "same command again to resume from the last one."
        )

    def _send(self, message: bytes) -> None:
        for connection in self._connections.values():
            with suppress(OSError):  # reading notices a closed connection
                connection.send(message + b"\n")


def _read(connection: socket.socket) -> bytes:
    """The bytes received so far; at the end of the connection, `_END` on a line of its own."""
    try:
        return connection.recv(4096) or b"\n" + _END + b"\n"
    except BlockingIOError:
        return b""
    except OSError:
        return b"\n" + _END + b"\n"
