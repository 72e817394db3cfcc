"""Download files over HTTP with time limits, retries, resume and a checked SHA-256."""

from __future__ import annotations

import errno
import fcntl
import hashlib
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
from mlx_zh.system.json_text import load_json
from mlx_zh.system.storage import sync, sync_folder, write_exact_json


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait for a server, in seconds."""

    connect: float = 10.0  # until it accepts the connection
    read: float = 30.0  # without receiving a byte
    retry_after: float = 5.0  # before the next try, if the server asks for a pause
    probe: float = 3.0  # for a check of whether it answers at all
    choose: float = 10.0  # in all, to find out which hub answers
    head_start: float = 2.0  # for the preferred hub, before the other one is asked


LIMITS = Limits()

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes received so far, and its size in bytes (None if the server gives none)."""

# What an HTTP status means. `hub` words 401, 403 and 404 in its own way.
STATUS = {
    401: "the server answers 401, it asks for a name and a password or a token",
    403: "the server answers 403, it refuses access from this address or account",
    404: "the server answers 404, there is no such file",
    429: "the server answers 429, too many requests: wait some minutes and run the same command again",
    500: "the server answers 500, it has an internal error: try again later",
    502: "the server answers 502, the server behind it is down: try again later",
    503: "the server answers 503, it is overloaded or down: try again later",
    504: "the server answers 504, the server behind it does not answer: try again later",
}

_RETRIED = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth another try
_TRIES = 3  # in a row without a new byte


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to download. Error messages begin with `label` and end with `advice` on what the user can do.

    With `sha256` (64 hex digits) the content is checked. `session` is the HTTP client; without it, one is opened for
    this download. `refused` may raise a better error for a response that is a failure and is not retried.
    """

    address: str
    label: str
    advice: str
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    session: Any = None
    refused: Callable[[Any], None] | None = None


def fetch_file(wanted: RemoteFile, target: Path, progress: Progress | None = None) -> None:
    """Download a file to `target`, atomically. If `target` exists, nothing is done.

    Bytes arrive in `NAME.part`. A later call continues that part if a SHA-256 is given, or if the server sent an ETag
    or a date with it and confirms that the file is still the same.

    Raises DownloadError, and StorageError if the file cannot be written.
    """
    if urlsplit(wanted.address).scheme not in ("http", "https"):
        raise DownloadError(
            f"{wanted.label} does not answer: unknown url type, give an address with http:// or https://. "
            f"{wanted.advice}"
        )
    with full_disk(wanted.label, target), _own_part(target) as part:
        if part is None:
            return
        with _session(wanted) as session:
            _fill(wanted, session, part, progress)
        part.becomes(target)


@contextmanager
def full_disk(label: str, target: Path | None = None) -> Iterator[None]:
    """Inside this context, turn the error of a full disk into a StorageError that names `label`.

    With `target`, any other OSError while writing becomes a StorageError about `target`.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageError(
                f"The disk is full: {label} could not be stored. Make room and start again; what has arrived is kept."
            ) from error
        if target is None or error.errno is None:  # an OSError without a number is an HTTP library's network error
            raise
        raise StorageError(f"{target} cannot be written: {error.strerror or error}.") from error


def is_full(error: BaseException) -> bool:
    """Whether `error` is the operating system's error for a full disk or quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def host(address: str) -> str:
    """The host and port of an address, without a user name and password."""
    return urlsplit(address).netloc.rpartition("@")[2] or address


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, the outermost first.

    ModelScope's error for a download of many files holds one exception per file; the first of them is the cause.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        failed = getattr(error, "failed_files", None) or {}
        cause = next(iter(failed.values()), None) or error.__cause__
        error = cause or (None if error.__suppress_context__ else error.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception or one of its causes carries, if any."""
    for cause in chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def reason_of(error: BaseException, address: str, statuses: Mapping[int, str] = STATUS) -> str:
    """The reason of a failed download from `address`, in words, for an exception of any HTTP library."""
    if status := status_of(error):
        return statuses.get(status, f"the server answers {status}")
    causes = list(chain(error))
    names = [kind.__name__ for cause in causes for kind in type(cause).__mro__]
    if any(name.startswith("ConnectTimeout") for name in names):
        return f"{host(address)} did not accept a connection within {LIMITS.connect:g} s"
    if any(name in ("TimeoutException", "Timeout", "TimeoutError", "ReadTimeoutError") for name in names):
        return f"{host(address)} sent nothing for {LIMITS.read:g} s"
    return first_line(causes[-1] if str(causes[-1]).strip() else error).rstrip(".")


class _BrokenOffError(Exception):
    """The response ended too early, or does not continue the bytes that are here."""


class _BusyError(Exception):
    """The server asks for another try later."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(STATUS.get(status, f"the server answers {status}"))
        self.retry_after = retry_after


class _Part:
    """The file `NAME.part`, locked by this process, and the server's validator (ETag or date) of its content."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self.file = path, file
        self._note = path.with_name(path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return os.fstat(self.file.fileno()).st_size

    @property
    def validator(self) -> str | None:
        """The ETag or date that the server sent with these bytes, if any."""
        try:
            return str(load_json(self._note)["validator"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, validator: str | None) -> None:
        """Empty the file and note the `validator` of the bytes that will follow."""
        self._note.unlink(missing_ok=True)
        self.file.seek(0)
        self.file.truncate()
        if validator:
            write_exact_json(self._note, {"validator": validator})

    def write(self, piece: bytes) -> None:
        """Append bytes. The file is unbuffered, so `size` is exact and a full disk raises here."""
        rest = memoryview(piece)
        while rest:
            rest = rest[self.file.write(rest) :]

    def digest(self) -> Any:
        """A SHA-256 object over the bytes so far; leaves the file's position at its end."""
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256")

    def becomes(self, target: Path) -> None:
        """Rename the complete file to `target`."""
        sync(self.file.fileno())
        self.path.replace(target)
        self._note.unlink(missing_ok=True)
        sync_folder(target.parent)

    def remove(self) -> None:
        """Remove the part and its note."""
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


@contextmanager
def _own_part(target: Path) -> Iterator[_Part | None]:
    """Yield the part of `target`, locked against other processes; None if `target` exists."""
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

    limits = httpx2.Timeout(LIMITS.read, connect=LIMITS.connect)
    with httpx2.Client(follow_redirects=True, timeout=limits) as session:
        yield session


def _fill(wanted: RemoteFile, session: Any, part: _Part, progress: Progress | None) -> None:
    """Download until the part is complete, and check it. Only tries in a row without a new byte count as failures."""
    import httpx2

    failures, largest = 0, part.size
    while True:
        resumed = part.size > 0
        try:
            digest = _store(wanted, session, part, progress)
        except (httpx2.RequestError, httpx2.InvalidURL, _BrokenOffError, _BusyError) as error:
            if not _resumable(wanted, part):
                part.begin(None)
            failures = 1 if part.size > largest else failures + 1
            largest = max(largest, part.size)
            _wait_or_give_up(error, wanted, failures)
            continue
        if wanted.sha256 is None or digest == wanted.sha256.lower():
            return
        part.begin(None)
        if not resumed:
            raise DownloadError(
                f"{wanted.label} is not the file that was expected: its SHA-256 is {digest} and should be "
                f"{wanted.sha256}. Nothing was kept. The server, or a mirror or proxy in front of it, delivers a "
                f"changed file. {wanted.advice}"
            )


def _resumable(wanted: RemoteFile, part: _Part) -> bool:
    return wanted.sha256 is not None or part.validator is not None


def _store(wanted: RemoteFile, session: Any, part: _Part, progress: Progress | None) -> str:
    """Request the missing bytes and append them. Returns the SHA-256 of the whole file, 64 hex digits."""
    if part.size and not _resumable(wanted, part):
        part.begin(None)
    have = part.size
    headers = {"Accept-Encoding": "identity", **wanted.headers}
    if have:
        headers["Range"] = f"bytes={have}-"
        if wanted.sha256 is None and part.validator:
            headers["If-Range"] = part.validator
    with session.stream("GET", wanted.address, headers=headers) as answer:
        if answer.status_code == 416 and have:  # no bytes follow these: the part is complete, or of another file
            digest = part.digest().hexdigest()
            if digest != (wanted.sha256 or "").lower():
                part.begin(None)
                raise _BrokenOffError("the server no longer has the file whose download was begun")
            return str(digest)
        _refuse(wanted, answer)
        if answer.status_code == 200:
            have = 0
            part.begin(_validator(answer))
        elif not _continues(answer, have, None if wanted.sha256 else part.validator):
            part.begin(None)
            raise _BrokenOffError("the file on the server has changed since its download was begun")
        return _append(wanted, answer, part, have, progress)


def _refuse(wanted: RemoteFile, answer: Any) -> None:
    """Raise _BusyError or DownloadError for a response without a file."""
    status = answer.status_code
    if status in (200, 206):
        return
    if status in _RETRIED:
        raise _BusyError(status, answer.headers.get("Retry-After"))
    if wanted.refused is not None:
        wanted.refused(answer)
    reason = STATUS.get(status, f"the server answers {status}")
    raise DownloadError(f"{wanted.label} could not be downloaded: {reason}. {wanted.advice}")


def _append(wanted: RemoteFile, answer: Any, part: _Part, have: int, progress: Progress | None) -> str:
    """Append the body of a response to the `have` bytes that are here. Returns the SHA-256 of the whole file."""
    import httpx2

    name = Path(urlsplit(wanted.address).path).name
    total = _total(answer, have)
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
    if (have == 0 and wanted.sha256 is None) or (total is not None and have != total):
        raise _BrokenOffError(f"only {have} of {total or 'some'} bytes came")
    return str(digest.hexdigest())


def _total(answer: Any, have: int) -> int | None:
    """Bytes of the whole file, as a response says it; None where it does not."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return None
    # "bytes 100-199/300": the response may hold less than all of the rest (RFC 9110, section 14.4).
    if ranged := re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", "")):
        return int(ranged[1])
    length = answer.headers.get("Content-Length")
    return None if length is None else have + int(length)


def _validator(answer: Any) -> str | None:
    """The value for If-Range (RFC 9110, section 13.1.5): a strong ETag, else the date."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified")


def _continues(answer: Any, have: int, validator: str | None) -> bool:
    """Whether a 206 response begins after the `have` bytes that are here and belongs to the same file."""
    begins = re.match(rf"bytes {have}-", answer.headers.get("Content-Range", ""))
    return begins is not None and validator in (None, _validator(answer))


def _wait_or_give_up(error: Exception, wanted: RemoteFile, failures: int) -> None:
    """Wait before the next try. Raises DownloadError after the last one."""
    retry_after = error.retry_after if isinstance(error, _BusyError) else None
    wait = _wait(retry_after, failures)
    if failures < _TRIES and wait is not None:
        time.sleep(wait)
        return
    problem = "could not be downloaded" if isinstance(error, _BusyError) else "does not answer"
    raise DownloadError(f"{wanted.label} {problem}: {reason_of(error, wanted.address)}. {wanted.advice}") from error


def _wait(retry_after: str | None, failures: int) -> float | None:
    """Seconds until the next try; None if the server asks for more than `LIMITS.retry_after`."""
    if retry_after is None or not retry_after.isdigit():
        return 0.5 * 2 ** (failures - 1)
    return float(retry_after) if float(retry_after) <= LIMITS.retry_after else None
