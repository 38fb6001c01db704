"""Writing files so that neither a kill nor a full disk leaves half of one behind."""

import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Readers find the old content or the new one, never a part of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def append_lines(path: Path, lines: str) -> None:
    """Append all of `lines` or, when an error occurs, none of them."""
    left = lines.encode()
    try:
        with open(path, "ab", buffering=0) as file:  # a buffer would be written again when closed
            size = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> OSError:
    hint = "; make room there" if error.errno in NO_ROOM else ""
    return OSError(f"cannot write {path}: {error.strerror}{hint}")
