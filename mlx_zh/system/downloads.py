"""Files over HTTP: one time limit, a few tries, a download that goes on where it stopped, and a checked SHA-256."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_zh.errors import DownloadError, StorageError, first_line
from mlx_zh.system.storage import sync, sync_folder, write_json


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a server is waited for, in seconds."""

    connect: float = 10.0  # until it accepts the connection
    silence: float = 30.0  # without a byte
    wait: float = 5.0  # that it asks for before the next try
    glance: float = 3.0  # for those who only want to know whether somebody is there


LIMITS = Limits()

Progress = Callable[[str, int, int | None], None]
"""Is told a file's name, how many of its bytes are here, and how many it has, where the server says so."""

# What a server's answer means. A hub adds its own words for 401 and 403.
STATUS = {
    401: "the server answers 401, it wants a name and a password or a token",
    403: "the server answers 403, it does not let this address or this account have it",
    404: "the server answers 404, there is no such file",
    429: "the server answers 429, too many requests: wait some minutes and run the same command again",
    500: "the server answers 500, it is broken: try again later",
    502: "the server answers 502, what stands behind it is down: try again later",
    503: "the server answers 503, it is overloaded or down: try again later",
    504: "the server answers 504, what stands behind it does not answer: try again later",
}

_AGAIN = (408, 429, 500, 502, 503, 504)
_TRIES = 3  # in a row that bring nothing new


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address, and how messages speak of it.

    `called` is what could not be downloaded, `way` what the user can do then. With `sha256` (64 hex digits) the
    content is checked. `session` is the HTTP client, one of its own without; `refused` may raise a better error for
    an answer that is none of success and not worth another try.
    """

    address: str
    called: str
    way: str
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    session: Any = None
    refused: Callable[[Any], None] | None = None


def fetch_file(wanted: RemoteFile, target: Path, progress: Progress | None = None) -> None:
    """Download to `target`, which is there whole or not at all. Where it is there already, nothing happens.

    What has arrived lies in `NAME.part` until then, and the next call goes on after it: where a SHA-256 is known, or
    where the server gave the file an ETag or a date and confirms that it is still the same.

    Raises DownloadError with `wanted.way`; StorageError on a full disk.
    """
    if urlsplit(wanted.address).scheme not in ("http", "https"):
        raise DownloadError(
            f"{wanted.called} does not answer: unknown url type, give one with http:// or https://. {wanted.way}"
        )
    with full_disk(wanted.called, target), _own_part(target) as part:
        if part is None:
            return
        with _session(wanted) as session:
            _fill(wanted, session, part, progress)
        part.becomes(target)


@contextmanager
def full_disk(called: str, place: Path | None = None) -> Iterator[None]:
    """Turn a full disk, and with `place` every refusal to write it, into StorageError.

    `called` is what could not be stored.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageError(
                f"The disk is full: {called} could not be stored. Make room and start again; "
                "what has arrived is kept."
            ) from error
        if place is None or error.errno is None:  # one without a number is a library's own, of the network
            raise
        raise StorageError(f"{place} cannot be written: {error.strerror or error}.") from error


def is_full(error: BaseException) -> bool:
    """Whether an error is the operating system's for a full disk or a used-up quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def host(address: str) -> str:
    """The host of an address, with its port, without a user's name and password."""
    return urlsplit(address).netloc.rpartition("@")[2] or address


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from, the outermost first.

    ModelScope's error for a download of many files holds one for each; the first of them goes on the chain.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        failed = getattr(error, "failed_files", None) or {}
        cause = next(iter(failed.values()), None) or error.__cause__
        error = cause or (None if error.__suppress_context__ else error.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, or one that it was raised from."""
    for cause in chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def reason_of(error: BaseException, address: str, statuses: Mapping[int, str] = STATUS) -> str:
    """Why there was no file, in words, from any HTTP library's exception. `address` is where it was looked for."""
    if status := status_of(error):
        return statuses.get(status, f"the server answers {status}")
    causes = list(chain(error))
    names = [kind.__name__ for cause in causes for kind in type(cause).__mro__]
    if any(name.startswith("ConnectTimeout") for name in names):
        return f"{host(address)} did not accept a connection within {LIMITS.connect:g} s"
    if any(name in ("TimeoutException", "Timeout", "TimeoutError", "ReadTimeoutError") for name in names):
        return f"{host(address)} sent nothing for {LIMITS.silence:g} s"
    return first_line(causes[-1] if str(causes[-1]).strip() else error).rstrip(".")


class _BrokenOffError(Exception):
    """The answer ended too early, or is no continuation of what is here."""


class _BusyError(Exception):
    """The server asks to come again later."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(STATUS.get(status, f"the server answers {status}"))
        self.retry_after = retry_after


class _Part:
    """The file `NAME.part`, held by this process, and what the server says identifies the file."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self.file = path, file
        self._note = path.with_name(path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return os.fstat(self.file.fileno()).st_size

    @property
    def validator(self) -> str | None:
        """The ETag or date under which the bytes that are here were sent."""
        try:
            return str(json.loads(self._note.read_text(encoding="utf-8"))["validator"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, validator: str | None) -> None:
        """Empty the file; what comes next was sent under `validator`."""
        self._note.unlink(missing_ok=True)
        self.file.seek(0)
        self.file.truncate()
        if validator:
            write_json(self._note, {"validator": validator})

    def write(self, piece: bytes) -> None:
        """Append; the file is not buffered, so that `size` is right and a full disk shows itself here."""
        rest = memoryview(piece)
        while rest:
            rest = rest[self.file.write(rest) :]

    def digest(self) -> Any:
        """A SHA-256 object that has read what is here; the file's position is its end."""
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256")

    def becomes(self, target: Path) -> None:
        """Give the whole file its name."""
        sync(self.file.fileno())
        self.path.replace(target)
        self._note.unlink(missing_ok=True)
        sync_folder(target.parent)

    def remove(self) -> None:
        """Leave nothing."""
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


@contextmanager
def _own_part(target: Path) -> Iterator[_Part | None]:
    """The part of `target`, which no other process writes meanwhile; None where `target` is there."""
    path = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    while not target.is_file():
        with FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # waits until another process has ended its download
            try:
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue
            except FileNotFoundError:
                continue  # the other process has just renamed it
            part = _Part(path, file)
            try:
                yield part
            finally:
                if path.exists() and not part.size:
                    part.remove()
            return
    yield None


@contextmanager
def _session(wanted: RemoteFile) -> Iterator[Any]:
    if wanted.session is not None:
        yield wanted.session
        return
    import httpx2

    limits = httpx2.Timeout(LIMITS.silence, connect=LIMITS.connect)
    with httpx2.Client(follow_redirects=True, timeout=limits) as session:
        yield session


def _fill(wanted: RemoteFile, session: Any, part: _Part, progress: Progress | None) -> None:
    """Make the part the whole file and check it. Only tries in a row that bring nothing new are counted."""
    import httpx2

    failures, most = 0, part.size
    while True:
        resumed = part.size > 0
        try:
            digest = _store(wanted, session, part, progress)
        except (httpx2.RequestError, httpx2.InvalidURL, _BrokenOffError, _BusyError) as error:
            if not _resumable(wanted, part):
                part.begin(None)
            failures = 1 if part.size > most else failures + 1
            most = max(most, part.size)
            _wait_or_give_up(error, wanted, failures)
            continue
        if wanted.sha256 is None or digest == wanted.sha256.lower():
            return
        part.begin(None)
        if not resumed:
            raise DownloadError(
                f"{wanted.called} is not the file that was expected: its SHA-256 is {digest} and should be "
                f"{wanted.sha256}. Nothing was kept. The server, or a mirror or proxy before it, delivers a changed "
                f"file. {wanted.way}"
            )


def _resumable(wanted: RemoteFile, part: _Part) -> bool:
    return wanted.sha256 is not None or part.validator is not None


def _store(wanted: RemoteFile, session: Any, part: _Part, progress: Progress | None) -> str:
    """Ask for what is missing and append it; the SHA-256 of the whole, 64 hex digits."""
    if part.size and not _resumable(wanted, part):
        part.begin(None)
    have = part.size
    headers = {"Accept-Encoding": "identity", **wanted.headers}
    if have:
        headers["Range"] = f"bytes={have}-"
        if wanted.sha256 is None and part.validator:
            headers["If-Range"] = part.validator
    with session.stream("GET", wanted.address, headers=headers) as answer:
        if answer.status_code == 416 and have:  # nothing comes after what is here: it is whole, or another file
            digest = part.digest().hexdigest()
            if digest != (wanted.sha256 or "").lower():
                part.begin(None)
                raise _BrokenOffError("the server no longer has the file that was begun")
            return str(digest)
        _refuse(wanted, answer)
        if answer.status_code == 200:
            have = 0
            part.begin(_validator(answer))
        elif not _continues(answer, have, None if wanted.sha256 else part.validator):
            part.begin(None)
            raise _BrokenOffError("the server's file is another than the one that was begun")
        return _append(wanted, answer, part, have, progress)


def _refuse(wanted: RemoteFile, answer: Any) -> None:
    """Raise where an answer brings no file."""
    status = answer.status_code
    if status in (200, 206):
        return
    if status in _AGAIN:
        raise _BusyError(status, answer.headers.get("Retry-After"))
    if wanted.refused is not None:
        wanted.refused(answer)
    reason = STATUS.get(status, f"the server answers {status}")
    raise DownloadError(f"{wanted.called} could not be downloaded: {reason}. {wanted.way}")


def _append(wanted: RemoteFile, answer: Any, part: _Part, have: int, progress: Progress | None) -> str:
    """Write what an answer brings after the `have` bytes that are here; the SHA-256 of the whole."""
    import httpx2

    name = Path(urlsplit(wanted.address).path).name
    plain = answer.headers.get("Content-Encoding", "identity") == "identity"
    length = answer.headers.get("Content-Length") if plain else None
    total = None if length is None else have + int(length)
    digest = part.digest()
    try:
        for piece in answer.iter_bytes():
            digest.update(piece)
            part.write(piece)
            have += len(piece)
            if progress is not None:
                progress(name, have, total)
    except httpx2.RemoteProtocolError:
        raise _BrokenOffError(f"only {have} of {total or 'some'} bytes came") from None
    if have == 0 or (total is not None and have != total):
        raise _BrokenOffError(f"only {have} of {total or 'some'} bytes came")
    return str(digest.hexdigest())


def _validator(answer: Any) -> str | None:
    """What If-Range may say of this answer's file: a strong ETag, else its date."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified")


def _continues(answer: Any, have: int, validator: str | None) -> bool:
    """Whether a 206 begins after the bytes that are here, and is of the same file."""
    begins = re.match(rf"bytes {have}-", answer.headers.get("Content-Range", ""))
    return begins is not None and validator in (None, _validator(answer))


def _wait_or_give_up(error: Exception, wanted: RemoteFile, failures: int) -> None:
    """Wait before the next try. Raises DownloadError after the last one."""
    asked = error.retry_after if isinstance(error, _BusyError) else None
    wait = _wait(asked, failures)
    if failures < _TRIES and wait is not None:
        time.sleep(wait)
        return
    what = "could not be downloaded" if isinstance(error, _BusyError) else "does not answer"
    raise DownloadError(f"{wanted.called} {what}: {reason_of(error, wanted.address)}. {wanted.way}") from error


def _wait(asked: str | None, failures: int) -> float | None:
    """Seconds until the next try; None where the server asks for longer than one waits at a prompt."""
    if asked is None or not asked.isdigit():
        return 0.5 * 2 ** (failures - 1)
    return float(asked) if float(asked) <= LIMITS.wait else None
