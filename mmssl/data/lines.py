"""Files of JSON lines that several processes append to at once."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def append_line(path: str | Path, entry: dict[str, Any], *, fresh: bool = False) -> None:
    """Append an entry with one system call, so that lines of several writers do not mix.

    Args:
        path: the file; made if it is missing.
        entry: what the line holds.
        fresh: begin a new line even if the last writer was killed in the middle of one.

    Raises:
        OSError: if it could not be written whole; ENOSPC for a part of a line.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        line = (json.dumps(entry) + "\n").encode()
        end = os.fstat(fd).st_size
        if fresh and end and os.pread(fd, 1, end - 1) != b"\n":
            line = b"\n" + line
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(fd)
