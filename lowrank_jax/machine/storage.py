"""Files that are replaced in one move, appended to, locked, and read again after a failure that may pass.

No function here writes through a symbolic link at the end of its path, which could lead out of a run's folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from lowrank_jax.machine.console import say

PAUSES = (0.5, 1, 2, 4, 8)  # seconds before each further attempt of a read: 15.5 s in all
TRANSIENT = """
    EIO EACCES EAGAIN EBUSY EINTR EMFILE ENFILE ENETDOWN ENETUNREACH ENOTCONN ENOLINK ECONNABORTED ECONNREFUSED
    ECONNRESET EHOSTDOWN EHOSTUNREACH EPERM EPIPE EREMOTEIO ESHUTDOWN ESTALE ETIMEDOUT
""".split()
# Of flock on Lustre, NFS, FUSE, 9p.
NO_LOCKS = {getattr(errno, name) for name in "ENOSYS ENOTSUP EOPNOTSUPP ENOLCK EINVAL EPERM ENOTTY".split()}
BEAT_SECONDS = 10  # between two heartbeats of a lock file's owner
STALE_SECONDS = 120  # without a heartbeat, after which the lock of another host is free
NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
T, MayPass = TypeVar("T"), Callable[[BaseException], bool]


def replace(path: str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file in one move, so that a kill leaves the old or the new one; `content` may write to a file itself.

    Raises OSError, which names the file, where that fails: the old file stays.
    """
    content = content.encode() if isinstance(content, str) else content
    folder, name = os.path.split(os.path.abspath(path))
    unfinished = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    with _naming(path, "be written"):
        try:
            with open(os.open(unfinished, NEW | os.O_RDWR, 0o666), "wb") as f:
                content(f) if callable(content) else f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            raise


def clear_unfinished(folder: str) -> None:
    """Remove what `replace` left in a folder where it was killed a while ago."""
    for entry in os.scandir(folder):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    os.remove(entry.path)


def append_line(path: str, line: bytes) -> None:
    """Add a line to a file, on a line of its own even after one that a kill cut short.

    Raises OSError, which names the file: also for a link, or what is no file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _naming(path, "be appended to"), open(os.open(path, flags, 0o666), "r+b", buffering=0) as f:
        _must_be_file(f.fileno())
        size = os.fstat(f.fileno()).st_size
        is_cut_short = size > 0 and os.pread(f.fileno(), 1, size - 1) != b"\n"
        rest = b"\n" * is_cut_short + line + b"\n"
        while rest:
            rest = rest[f.write(rest) :]


def read(path: str) -> bytes:
    """Return a file's bytes, after failures that may pass; raises OSError with its name, also for what is no file.

    Nobody may ever write to a named pipe: it is not waited for.
    """

    def attempt() -> bytes:
        at_once = lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        with _naming(path, "be read"), open(path, "rb", opener=at_once) as f:
            _must_be_file(f.fileno())
            return f.read()

    return again(attempt)


def again(read: Callable[[], T], may_pass: MayPass | None = None, note=lambda e, pause: None) -> T:
    """Return `read()`; where it fails for a reason that may pass, call it again after each of PAUSES.

    `note(e, pause)` is called before each pause. Raises OSError with the last cause in one line, and any other failure
    as it is.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except Exception as e:
            if not (may_pass or is_transient)(e):
                raise
            if pause is None:
                raise OSError(f"{' '.join(str(e).split())} (tried {len(PAUSES) + 1} times)") from e
            note(e, pause)
        time.sleep(pause)


def is_transient(e: BaseException | None) -> bool:
    """Return whether an error of the operating system, or what caused it, may be gone a few seconds later."""
    passes = isinstance(e, TimeoutError) or (isinstance(e, OSError) and errno.errorcode.get(e.errno) in TRANSIENT)
    return passes or (e is not None and is_transient(e.__cause__))


@contextlib.contextmanager
def lock(path: str) -> Iterator[None]:
    """Hold the file `path` as a lock; raises BlockingIOError where another process has it, and OSError with its name.

    Where the file system has no locks, the lock is a file `path`-owner that is created exclusively. It holds host,
    process and start, and is touched every BEAT_SECONDS. It is free once its process is gone from this host, or has not
    touched it for STALE_SECONDS on another.
    """
    with _naming(path, "be locked"), contextlib.ExitStack() as stack:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, fd)
            _must_be_file(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno not in NO_LOCKS:
                    raise
                say(f"note: no file locks here ({e.strerror}); {path}-owner locks the folder instead")
                stack.enter_context(owned(f"{path}-owner"))
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    break  # otherwise the process that had it before has removed the file
        guard = stack.pop_all()
    with guard:
        yield


class Files:
    """Files of this machine, as `owned` uses them; a bucket's objects have the same methods (bucket.py)."""

    replace = staticmethod(lambda path, text: replace(path, text))
    remove = staticmethod(os.remove)

    def create(self, path: str, text: str) -> None:
        with open(os.open(path, NEW | os.O_WRONLY, 0o666), "w") as f:
            f.write(text)

    def read(self, path: str) -> str:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as f:
            return f.read()

    def touch(self, path: str, text: str) -> None:
        os.utime(path, follow_symlinks=False)

    def modified(self, path: str) -> float:
        return os.lstat(path).st_mtime


@contextlib.contextmanager
def owned(path: str, files=Files()) -> Iterator[Callable[[], bool]]:  # noqa: B008, which has no state
    """Own a file that `_take` creates until the end, with a heartbeat; yield a function that says whether we still do.

    Raises BlockingIOError where another process owns it.
    """
    me = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid()), "token": secrets.token_hex(8)}
    _take(path, json.dumps(me), files)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(BEAT_SECONDS):
            if _owner(path, files) not in (me, {}):  # this process stood still for too long: two must not write
                say(f"error: {path} was taken over by another process; this one ends", everyone=True)
                os._exit(1)
            with contextlib.suppress(OSError):
                files.touch(path, json.dumps(me))

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield lambda: _owner(path, files) == me
    finally:
        is_over.set()
        thread.join()
        if _owner(path, files) == me:
            files.remove(path)


def _take(path: str, me: str, files) -> None:
    """Create the file with this content, or take it over from an owner that is gone; raises BlockingIOError.

    Of several processes that try at once, the one that first takes a further file, named after the lost owner, wins.
    """
    try:
        files.create(path, me)
        return
    except FileExistsError:
        owner = _owner(path, files)
    if not _is_gone(path, owner, files):
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")
    turn = f"{path}-{owner.get('token', 'unknown')}"
    _take(turn, me, files)
    try:
        if _owner(path, files) != owner:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has just taken it")
        files.replace(path, me)
    finally:
        files.remove(turn)


def _owner(path: str, files) -> dict:
    """Return what a lock's file says; nothing where a kill left it empty, it is gone, or nobody here wrote it."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        owner = json.loads(files.read(path))
        return owner if re.fullmatch("[A-Za-z0-9]{1,64}", str(owner["token"])) else {}
    return {}


def _is_gone(path: str, owner: dict, files) -> bool:
    if owner.get("host") == _host() and isinstance(owner.get("pid"), int):
        return _started(owner["pid"]) != owner.get("started")
    probe = f"{path}-{secrets.token_hex(4)}"  # the clock of the file system, which may differ from this host's
    files.replace(probe, "")
    try:
        return abs(files.modified(probe) - files.modified(path)) > STALE_SECONDS  # a copy may lie in the future
    except FileNotFoundError:  # its owner has just ended
        return False
    finally:
        files.remove(probe)


def _host() -> str:
    """Return a name of this host since it was started, and of the container whose process numbers we see."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [os.readlink("/proc/self/ns/pid"), open("/proc/sys/kernel/random/boot_id").read().strip()[:8]]
    return " ".join(parts)


def _started(pid: int) -> str:
    """Return when a process of this host was started, in ticks since the host was; empty where it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            state, *fields = f.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _must_be_file(fd: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


@contextlib.contextmanager
def _naming(path: str, action: str) -> Iterator[None]:
    """Name the file, and what could not be done with it, in the OSErrors of the body; their errno stays."""
    try:
        yield
    except OSError as e:
        reason = "it is a symbolic link; remove it" if e.errno == errno.ELOOP else e.strerror or str(e)
        named = type(e)(f"{path} cannot {action}: {reason[:1].lower()}{reason[1:]}")
        named.errno = e.errno
        raise named from None
