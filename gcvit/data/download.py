"""Download files of a remote data directory (s3://, gs://, https://, hf://), whole and checked.

`download` is the only entry. It retries failures that may pass (a cut connection, a 5xx, silence, wrong bytes), raises
at once for others (a 404, a 403, a full disk), and never waits without a limit. fsspec implements the protocols, and
reads the credentials where each protocol's package expects them.

`lock_file` prevents two processes of a node from downloading the same file: each locks the partial file that it writes.
The lock ends with its process, so that a killed process leaves only a partial file, which the next one overwrites.
"""

import fcntl
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from gcvit.errors import UserError

# Protocol to the package that fsspec needs for it.
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
# These answer a plain read with one request for all; the others with one for each block.
STREAMED = ("http", "https", "hf")
BLOCK_BYTES = 16 << 20

NUM_TRIES = 5
FIRST_DELAY_S = 1.0  # doubled after each try
CONNECT_TIMEOUT_S = 15
READ_TIMEOUT_S = 30
# A slower transfer counts as stuck: a server that sends a byte now and then would pass every timeout.
MIN_BYTES_PER_S = 20_000
SLOW_S = 30  # slower downloads are reported
# Not the module's own generator, whose draws belong to the samples that a worker transforms.
_JITTER = SystemRandom()

Say = Callable[[str], None]


class Absent(UserError):
    """The server refuses the file: it does not exist, or access is denied. `where` holds the URL and the reason."""

    where = ""


class Stopped(Exception):
    """A download ended because its caller no longer wants it."""


class _Failed(Exception):
    """An attempt failed by our own rules; the text is the reason."""


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def is_remote(data_dir: str) -> bool:
    """Tell whether `data_dir` is a URL; its protocol is checked when it is read."""
    return re.match(r"[A-Za-z][\w+.:-]*://", data_dir) is not None


def join(url: str, name: str) -> str:
    """Build the URL of `name` below `url`; the query of an HTTP URL (an access token, for example) stays at the end.

    Raises:
        UserError: the URL cannot be parsed.
    """
    if not url.startswith(("http://", "https://")):
        return f"{url.rstrip('/')}/{name}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UserError("a URL that cannot be parsed", got=redact(url)) from None
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment=""))


def redact(url: str) -> str:
    """`url` as it may be printed: without user, password, query and fragment.

    Where a password's own "/", "?" or "#" makes it unclear which part is the host, nothing but the protocol stays.
    """
    protocol, mark, rest = url.partition("://")
    split = re.match(r"([^/?#]*)([^?#]*)", rest)
    assert split  # both parts may be empty
    host, path = split[1].rpartition("@")[2], split[2]
    # In hf:// an "@" in the path names a revision.
    unclear = protocol.lower() in ("http", "https") and "@" in rest[len(split[1]) :]
    if not mark or unclear or not re.fullmatch(r"([\w.-]*|\[[\w.:]*\])(:\d*)?", host):
        return f"{protocol}://..." if mark else "..."
    return f"{protocol}://{host}{path}"


@contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[BufferedRandom | None]:
    """Create and lock `path` against every other process and thread of the node; the file may be renamed inside.

    The open file is yielded, with the bytes that a killed process left; None if it is locked and not `wait`. A file
    that still has its name at the end is removed.
    """
    while True:
        with local_errors():
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            is_ours = _lock(file, wait)
        if not is_ours:
            file.close()
            yield None
            return
        if _is_same(file, path):
            break
        file.close()  # renamed or removed during the wait: the name belongs to another file now
    try:
        yield file
    finally:
        # Only the owner of the lock renames or removes, so that this is our file.
        if _is_same(file, path):
            path.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open too
        with suppress(OSError):  # a write that failed fails again
            file.close()


def _lock(file: BufferedRandom, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False


def _is_same(file: BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def download(
    url: str,
    file: BinaryIO,
    *,
    num_bytes: int | None = None,
    check: Callable[[], str | None],
    say: Say = say_on_stderr,
    stop: threading.Event | None = None,
) -> None:
    """Download `url` into `file`, from its beginning, and flush it to disk.

    Args:
        num_bytes: size of the remote file, if it is known.
        check: reads the file again and returns what is wrong with it, or None.
        say: prints a line for each attempt that failed.
        stop: set by another thread to give up.

    Raises:
        Absent: the server refuses the file; at once.
        UserError: the protocol's package is missing, the disk is full, or the last attempt failed.
        Stopped: soon after `stop` was set.
    """
    stop = stop or threading.Event()
    begin = time.monotonic()
    reason: str | None = None
    for num_failed in range(NUM_TRIES):
        if num_failed:
            delay = FIRST_DELAY_S * 2 ** (num_failed - 1) * _JITTER.uniform(0.5, 1.5)
            say(f"{redact(url)}: {reason}; try {num_failed + 1} of {NUM_TRIES} in {delay:.1f} s")
            stop.wait(delay)
        if stop.is_set():
            raise Stopped
        try:
            received = _copy(url, file, num_bytes, stop)
            if reason := check():
                continue
        except (UserError, Stopped):
            raise
        except Exception as error:  # the packages raise their own kinds, and their libraries' kinds
            reason = _describe(error)
            if _is_refusal(error):
                where, what = f"{redact(url)} ({reason})", "a remote file is not there, or not for us"
                absent = Absent(what, got=where, hint="check the URL and the credentials")
                absent.where = where
                raise absent from None
            continue
        if (seconds := time.monotonic() - begin) > SLOW_S:
            say(f"{redact(url)}: {received / 1e6:.1f} MB took {seconds:.0f} s")
        return
    raise UserError(
        "a download failed",
        got=f"{redact(url)} ({NUM_TRIES} tries, the last: {reason})",
        hint="check the network and the server; a hash that differs each time means that the remote file is corrupt",
    )


def _copy(url: str, file: BinaryIO, num_bytes: int | None, stop: threading.Event) -> int:
    """Make one attempt to download.

    Returns:
        The bytes received.

    Raises:
        Exception: whatever fsspec and the protocol's package raise.
    """
    filesystem, options = _open_filesystem(url)
    with local_errors():
        file.seek(0)  # writes the rest of a failed attempt's buffer
    begin, received = time.monotonic(), 0
    with filesystem.open(url, "rb", cache_type="none", **options) as remote:
        # A streamed read returns the bytes that have arrived, at most a block.
        while chunk := remote.read(BLOCK_BYTES):
            received += len(chunk)
            if stop.is_set():
                raise Stopped
            if num_bytes is not None and received > num_bytes:
                raise _Failed(f"more than {num_bytes} bytes")
            if received < MIN_BYTES_PER_S * (time.monotonic() - begin - READ_TIMEOUT_S):
                raise _Failed(f"{received} bytes in {time.monotonic() - begin:.0f} s")
            with local_errors():
                file.write(chunk)
    if num_bytes not in (None, received):
        raise _Failed(f"{received} of {num_bytes} bytes")
    with local_errors():
        file.truncate(received)
        file.flush()
        os.fsync(file.fileno())
    return received


def _open_filesystem(url: str) -> tuple[Any, dict[str, Any]]:
    """Open fsspec's file system for `url`; also return the options with which it reads a file front to back."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"block_size": 0 if protocol in STREAMED else BLOCK_BYTES}
    settings: dict[str, Any] = {}
    if protocol not in PACKAGES:
        expected = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError("a data directory of an unknown protocol", got=f"{protocol}://", expected=expected)
    try:
        import fsspec

        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, connect=2 * CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
            )
            # Proxies are read from the environment, as in the other packages. Compressing a tar saves nothing.
            # aiohttp's default buffer is so small that the copies of its pieces dominate.
            headers = {"Accept-Encoding": "identity"}
            session = {"timeout": timeout, "trust_env": True, "headers": headers, "read_bufsize": 1 << 20}
            settings["client_kwargs"] = session
            options["size"] = 1  # any: it spares a HEAD request and is not used in a streamed read
        # fsspec caches one per process, and discards it in a fork. The other packages have short timeouts.
        return fsspec.filesystem(protocol, **settings), options
    except ImportError:
        package = PACKAGES[protocol]
        raise UserError(f"{protocol}:// needs the package {package}", hint=f"pip install {package}") from None


@contextmanager
def local_errors() -> Iterator[None]:
    """Turn errors of the local disk into UserErrors, so that they are not retried like those of the network."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "cannot write to the cache of remote shards",
            got=error.strerror if error.filename is None else f"{error.filename} ({error.strerror})",
            hint="free space on its disk, or set another data.cache_dir, or a smaller data.cache_bytes",
        ) from None


def _is_refusal(error: Exception) -> bool:
    """Tell whether another attempt would get the same answer."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    # aiohttp, gcsfs and huggingface_hub store the status here.
    places = ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code"))
    status = next((found for place, name in places if isinstance(found := getattr(place, name, None), int)), 0)
    return 400 <= status < 500 and status not in (408, 425, 429)  # these three say "later"


def _describe(error: Exception) -> str:
    """Describe an error of the network in one line without secrets."""
    if isinstance(error, _Failed):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = re.sub(r"[\w+]+://\S+", lambda match: redact(match[0]), " ".join(str(error).split()))
    text = re.sub(r"\?\S+", "?...", text)
    return f"{type(error).__name__}: {text[:200]}"
