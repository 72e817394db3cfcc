"""Whether the other ranks of a run are alive: MLX's collectives wait for a rank that is gone, some of them for ever.

Every rank holds one TCP connection, with rank 0, and writes to it twice a second. A connection that closes, or is
silent for `PATIENCE` seconds, ends the process with a line that names the rank; rank 0 tells the others.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from mlx_zh.errors import DistributedError

INTERVAL, PATIENCE = 0.5, 30.0  # seconds
Peers = dict[int, tuple[str, socket.socket]]  # name and connection by rank
_KNOCK_SECONDS = 5.0
_ALIVE, _LEAVING, _LOST, _END = b"alive", b"leaving", b"lost", b"end"  # messages, a line each


class Door:
    """Where rank 0 waits for the others to connect; they need `key`.

    `host` is where the engine reaches rank 0, or empty. In a ring of cables only neighbours reach that address, so
    that rank 0's others are offered too.
    """

    def __init__(self, host: str) -> None:
        here = host.startswith("127.")
        self._socket = socket.create_server((host if here else "", 0))
        self._secret = secrets.token_hex(16)
        hosts = [host] if here else list(dict.fromkeys([host, *_addresses()]))
        self.key = " ".join([str(self._socket.getsockname()[1]), self._secret, *filter(None, hosts)])

    def accept(self, count: int) -> Peers:
        """The `count` ranks that have connected. Raises DistributedError."""
        found: Peers = {}
        self._socket.settimeout(PATIENCE)
        try:
            while len(found) < count:
                connection, _ = self._socket.accept()
                connection.settimeout(PATIENCE)
                secret, rank, name = _line(connection).split(" ", 2)
                if secrets.compare_digest(secret, self._secret):
                    found[int(rank)] = name, connection
        except (OSError, ValueError) as error:
            raise DistributedError(f"{count - len(found)} ranks did not report to rank 0 ({error}).") from error
        finally:
            self._socket.close()
        return found


def connect(key: str, rank: int) -> Peers:
    """Connect to rank 0, at the first of its addresses that answers; nothing where none does."""
    port, secret, *hosts = key.split(" ")
    for host in hosts:
        with suppress(OSError):
            connection = socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS)
            connection.sendall(f"{secret} {rank} {socket.gethostname()}\n".encode())
            return {0: (host, connection)}
    return {}


def _addresses() -> list[str]:
    """What other machines may reach this one by."""
    name = socket.gethostname()
    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # sends nothing; tells which network leads outward
        found.append(str(outward.getsockname()[0]))
    return [*found, name, f"{name}.local"]


def _line(connection: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n") and len(data) < 1000:
        if not (more := connection.recv(1)):
            raise ValueError("a connection closed")
        data += more
    return data.decode(errors="replace").strip()


def leave_now(text: str) -> None:
    """Print `text`, if any, and end the process, whatever its other threads wait for."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        if text:
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
    os._exit(2)


class Heartbeat:
    """Watches `peers` (rank: name and connection) from a thread; `lost` is called with what to tell the user."""

    def __init__(self, peers: Peers, lost: Callable[[str], None] = leave_now) -> None:
        self._lost = lost
        self._names = {peer: name for peer, (name, _) in peers.items()}
        self._connections = {peer: connection for peer, (_, connection) in peers.items()}
        self._closing = threading.Event()
        for connection in self._connections.values():
            connection.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave in peace: the others hear that this rank has done its part."""
        self._closing.set()
        self._thread.join()
        self._tell(_LEAVING)
        for connection in self._connections.values():
            connection.close()

    def _watch(self) -> None:
        due = time.monotonic()
        heard = dict.fromkeys(self._connections, due)
        unread = dict.fromkeys(self._connections, b"")
        while not self._closing.is_set() and self._connections:
            if time.monotonic() >= due:  # not whenever something was read: two ranks would answer each other for ever
                self._tell(_ALIVE)
                due = time.monotonic() + INTERVAL
            left = max(0.0, due - time.monotonic())
            ready, _, _ = select.select(list(self._connections.values()), [], [], left)
            for peer, connection in list(self._connections.items()):
                if connection in ready:
                    heard[peer] = time.monotonic()
                    *lines, unread[peer] = (unread[peer] + _read(connection)).split(b"\n")
                    self._take(peer, lines)
                elif time.monotonic() - heard[peer] > PATIENCE:
                    self._give_up(peer, f"nothing was heard of it for {PATIENCE:.0f} s")

    def _take(self, peer: int, lines: list[bytes]) -> None:
        for line in lines:
            if line == _LEAVING:
                return self._connections.pop(peer).close()
            if line == _LOST:  # rank 0 has told the user
                self._connections.pop(peer).close()
                return self._lost("")
            if line == _END:
                return self._give_up(peer, "its process has ended")

    def _give_up(self, peer: int, why: str) -> None:
        self._connections.pop(peer).close()
        self._tell(_LOST)
        time.sleep(INTERVAL / 2)  # they read it before the connection breaks
        self._lost(
            f"rank {peer} ({self._names[peer]}) is gone: {why}. All ranks stop; what was saved is kept, and the same "
            "command goes on from there."
        )

    def _tell(self, message: bytes) -> None:
        for connection in self._connections.values():
            with suppress(OSError):  # what is closed or full is found out by reading
                connection.send(message + b"\n")


def _read(connection: socket.socket) -> bytes:
    """What has come; `_END` in a line of its own at the end of the connection."""
    try:
        return connection.recv(4096) or b"\n" + _END + b"\n"
    except BlockingIOError:
        return b""
    except OSError:
        return b"\n" + _END + b"\n"
