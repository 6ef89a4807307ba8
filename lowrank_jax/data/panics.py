"""Failures of `tokenizers`, which is written in Rust: its panics are no Exception, and write a page to stderr."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator


def is_failure(e: BaseException) -> bool:
    """Return whether a library failed, and not this process: a signal is no Exception either."""
    return isinstance(e, Exception) or _is_panic(e)


def _is_panic(e: BaseException) -> bool:
    return type(e).__name__ == "PanicException"  # each library has a class of its own


_stderr = threading.Lock()  # of two that replaced it at once, one would put back the other's file


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Write the body's output to stderr at its end, but nothing if a library panics."""
    with _stderr:
        try:
            kept, stderr = tempfile.TemporaryFile(), os.dup(2)
        except OSError:  # there is no room for a file, or stderr is closed
            yield
            return
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException as e:
            if _is_panic(e):
                kept.truncate(0)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            with contextlib.suppress(OSError):
                os.write(2, kept.read())
            kept.close()
