"""Remote files, by fsspec: which URLs are allowed, how large a file is, and parts of it, with patience.

Any store that is only a store is allowed (http, https, s3, gs, az, hf, sftp, ...), if its fsspec package is installed.
Protocols of fsspec that run something or wrap other files are refused, and so are chains of URLs ("::").  Credentials
and end points come from where each store's own package looks for them: environment, configuration files, and fsspec's
own configuration (``FSSPEC_S3_ENDPOINT_URL`` and the like).

Every request has a time limit and is tried again, after a growing and random pause, unless the answer is final
(not found, not allowed).  An HTTP server must answer range requests: one that sends whole files is refused.

Environment:
    MMSSL_REMOTE_TIMEOUT: seconds allowed for one request, 20 by default; one more for every 500 kB that are asked for.
    MMSSL_REMOTE_ATTEMPTS: how often a request is tried, 6 by default (with pauses of about 0.5, 1, 2, ... seconds).
"""

import email.utils
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from mmssl.data.tar import ShardError

_STORES = "http https s3 s3a gs gcs hf az abfs abfss adl oci ocilake oss tos tosfs ftp sftp ssh hdfs webhdfs smb webdav"
_STORES += " dropbox gdrive box dbfs lakefs root memory"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*)(::?)")
_PACKAGES = {"s3fs": "s3 s3a", "gcsfs": "gs gcs", "adlfs": "az abfs abfss adl", "aiohttp": "http https"}
_PACKAGES |= {"huggingface_hub": "hf", "paramiko": "sftp ssh"}
_SLOWEST = 500_000  # bytes a second
_LONGEST_PAUSE = 20.0  # seconds
_NEAR = 4 << 20  # a gap that is skipped no faster than read
_READ_AHEAD = (64 << 10, 8 << 20)
_HOST = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://[^/]*)\[[0-9A-Fa-f:.%]*\]")  # an IPv6 address
_SECRET = re.compile(r"(?<=://)[^/\s'\"]*@|(?<=\w)\?[^\s'\")]*")  # user and password, query
_ERRORS = {  # what the stores' packages raise, beside OSError
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "azure.core.exceptions": ("AzureError",),
    "paramiko": ("SSHException",),
    "httpx": ("HTTPError",),
}
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")
_Answer = TypeVar("_Answer")


class Missing(ShardError):
    """A remote file that is not there."""


@dataclass(frozen=True)
class Stat:
    """What a store tells of a file.

    ``version`` is the ETag or the like, else the time of change, else empty.  ``mtime`` is the time of change in
    nanoseconds, 0 if unknown.
    """

    size: int
    version: str
    mtime: int


def is_remote(path: str) -> bool:
    """Whether a path is a URL of a remote store.

    Raises:
        ValueError: for a URL whose scheme is unknown, runs something, or wraps other files.
    """
    scheme = _SCHEME.match(path)
    if not scheme or (scheme[1].lower() == "file" and "::" not in path):
        return False
    name, told = scheme[1].lower(), shown(path)
    if name == "pipe":
        raise ValueError(f"shards {path!r}: pipe: would run a command, which data must not; give paths of tar files")
    if "::" in _HOST.sub(r"\1", path):
        raise ValueError(f"shards {told!r}: chained URLs (::) are not read; give the URL of the tar itself")
    if name not in _STORES.split() or not path[len(name) :].startswith("://"):
        raise ValueError(
            f"shards {told!r}: unknown scheme {name}:; give local paths (./{told} if this is a name) or URLs of "
            "a store, such as https://, s3://, gs://, hf://"
        )
    return True


def beside(url: str, suffix: str) -> str:
    """The URL of a file that is named like another one, with ``suffix`` behind."""
    path, mark, query = url.partition("?") if is_http(url) else (url, "", "")
    return path + suffix + mark + query


def shown(path: str) -> str:
    """A path or URL as messages and names show it: without user, password and query, which may be secrets."""
    scheme, mark, rest = path.partition("://")
    if not mark:
        return path
    host, slash, name = rest.partition("/")
    user, _, place = host.rpartition("@")
    if is_http(path):
        return (scheme + mark + place + slash + name).partition("?")[0]
    return scheme + mark + (user.partition(":")[0] + "@" if user else "") + place + slash + name


def base_name(path: str) -> str:
    """The last part of a path or URL, without a query."""
    return os.path.basename(path.partition("?")[0] if is_http(path) else path)


def stat(url: str) -> Stat:
    """Size and version of a file.  Raises Missing if it is not there, ShardError if the store does not answer."""
    if is_http(url):
        return _persist(url, lambda limit: _http(url, 0, 1, limit)[1])
    return _persist(url, lambda limit: _stat(url, limit))


def fetch(url: str, start: int, stop: int, known: Stat) -> bytes:
    """The bytes [start, stop) of a file, all of them.

    Raises:
        ShardError: names the URL; if the store does not deliver, or if the file is not the one that is ``known``.
    """
    return _persist(url, lambda limit: _fetch(url, start, stop, known, limit), stop - start)


def put(url: str, data: bytes) -> bool:
    """Write a small file; False where that is not possible or not allowed."""
    if is_http(url):
        return False
    try:
        system, path = _system(url)
        _call(system, "pipe_file", path, _limit(len(data)), data)
    except (*_store_errors(), NotImplementedError):
        return False
    return True


def find(pattern: str) -> list[str]:
    """The URLs that match a glob, sorted.  Raises ValueError where the store cannot list files (http)."""
    if is_http(pattern):
        raise ValueError(
            f"shards {shown(pattern)!r}: an HTTP server cannot list files; "
            "name the shards with braces: {00000..00127}.tar"
        )
    system, path = _system(pattern)
    found = _persist(pattern, lambda limit: _call(system, "glob", path, 10 * limit))
    return sorted(system.unstrip_protocol(name) for name in found)


def has_magic(url: str) -> bool:
    """Whether a URL is a glob.  A question mark begins the query of an http URL."""
    return any(mark in _HOST.sub(r"\1", url.partition("?")[0]) for mark in "*[") or (not is_http(url) and "?" in url)


class RemoteReader:
    """A :class:`mmssl.data.tar.Reader` for scanning: reads ahead, the more the longer nothing large is skipped."""

    def __init__(self, url: str, known: Stat) -> None:
        self.url, self.known, self.size = url, known, known.size
        self._start, self._buffer, self._ahead = 0, b"", _READ_AHEAD[0]

    def pread(self, length: int, offset: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        at = offset - self._start
        if not 0 <= at <= len(self._buffer) - length:
            near = 0 <= at <= len(self._buffer) + _NEAR
            self._ahead = min(2 * self._ahead, _READ_AHEAD[1]) if near else _READ_AHEAD[0]
            stop = min(self.size, offset + max(length, self._ahead))
            self._buffer, self._start, at = fetch(self.url, offset, stop, self.known), offset, 0
        return self._buffer[at : at + length]


# ---- one request


def is_http(url: str) -> bool:
    return url[:8].lower().startswith(("http://", "https://"))


def _stat(url: str, limit: float) -> Stat:
    system, path = _system(url)
    system.invalidate_cache(path)  # a listing that was remembered would hide a change
    info = _call(system, "info", path, limit)
    if info.get("type") == "directory" or not isinstance(info.get("size"), int):
        raise ShardError(
            f"shard {shown(url)}: is not a file; give the URLs of tar files, or a folder's URL with / at its end"
        )
    return _told(info["size"], info)


def _told(size: int, info: dict[str, Any]) -> Stat:
    low = {key.lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    version = next((str(low[key]) for key in ("etag", "generation", "blobid") if low.get(key)), "")
    dates = ("lastmodified", "mtime", "updated", "modified", "created")
    mtime = next((_nanoseconds(low[key]) for key in dates if low.get(key)), 0)
    return Stat(size, version or (f"time {mtime}" if mtime else ""), mtime)


def _nanoseconds(moment: Any) -> int:
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            try:
                moment = email.utils.parsedate_to_datetime(moment)
            except ValueError:
                return 0
    if isinstance(moment, datetime):
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return int(moment * 1_000_000_000) if isinstance(moment, int | float) else 0


def _fetch(url: str, start: int, stop: int, known: Stat, limit: float) -> bytes:
    if is_http(url):
        data, now = _http(url, start, stop, limit)
        check_same(url, known, now)
    else:
        system, path = _system(url)
        data = _call(system, "cat_file", path, limit, start=start, end=stop)
    if len(data) != stop - start:
        raise OSError(f"{len(data)} bytes came instead of {stop - start}")
    return data


def check_same(url: str, known: Stat, now: Stat) -> None:
    """Raises ShardError if a file is not the one that was indexed."""
    if known.size != now.size:
        what = f"{now.size} bytes instead of {known.size}"
    elif known.version and now.version and known.version != now.version:
        what = f"version {now.version} instead of {known.version}"
    else:
        return
    raise ShardError(f"shard {shown(url)}: changed since it was indexed ({what}); start again to index it anew")


def _http(url: str, start: int, stop: int, limit: float) -> tuple[bytes, Stat]:
    # fsspec's own reading of parts believes whatever comes; here the answer's status, range and version are looked at.
    from fsspec.asyn import sync

    system, _ = _system(url)
    return sync(system.loop, _http_range, system, url, start, stop, timeout=limit)


async def _http_range(system: Any, url: str, start: int, stop: int) -> tuple[bytes, Stat]:
    options = dict(system.kwargs)
    part = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    options["headers"] = {**options.get("headers", {}), **part}
    session = await system.set_session()
    async with session.get(system.encode_url(url), **options) as response:
        told = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if told and response.status == 416:  # behind the end of an empty file, or of one that became shorter
            return b"", _told(int(told[2]), dict(response.headers))
        response.raise_for_status()
        if response.status != 206 or not told or told[1] != str(start):
            raise ShardError(
                f"shard {shown(url)}: its server sends whole files when a part is asked for (no range requests); "
                "copy the shards to a local disk or to a store that can"
            )
        return await response.read(), _told(int(told[2]), dict(response.headers))


# ---- patience


def _persist(url: str, call: Callable[[float], _Answer], length: int = 0) -> _Answer:
    """What ``call(time limit)`` returns, after as many attempts as it takes and is allowed."""
    attempts = max(1, int(os.environ.get("MMSSL_REMOTE_ATTEMPTS", "6")))
    last: BaseException
    for attempt in range(attempts):
        if attempt:
            # Random, or all workers of a cluster would come back to an overloaded store in the same moment.
            time.sleep(min(0.5 * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.SystemRandom().uniform(0.5, 1.5))
        try:
            return call(_limit(length))
        except _store_errors() as error:
            if _is_final(error):
                raise _refused(url, error) from None
            last = error
    raise ShardError(
        f"shard {shown(url)}: cannot be read, {attempts} attempts failed, the last with {_line(last)}; "
        "check the network and the store, and start again"
    ) from None  # whose text may hold a signature


def _limit(length: int) -> float:
    return float(os.environ.get("MMSSL_REMOTE_TIMEOUT", "20")) + length / _SLOWEST


def _store_errors() -> tuple[type[BaseException], ...]:
    modules = [(sys.modules[name], kinds) for name, kinds in _ERRORS.items() if name in sys.modules]
    return (OSError, EOFError, TimeoutError, *(getattr(module, kind) for module, kinds in modules for kind in kinds))


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of any of the packages carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for value in (getattr(error, "status", None), getattr(error, "status_code", None), getattr(error, "code", None)):
        if str(value).isdigit():
            return int(str(value))
    return response if isinstance(response, int) else getattr(response, "status_code", None)


def _is_final(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return type(error).__name__ in _FINAL


def _refused(url: str, error: BaseException) -> ShardError:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Missing(f"shard {shown(url)}: not found; check the URL")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return ShardError(
            f"shard {shown(url)}: access is refused ({_line(error)}); check the credentials, and that it exists"
        )
    return ShardError(f"shard {shown(url)}: the store refuses ({_line(error)}); check the URL")


def _line(error: BaseException) -> str:
    text = _SECRET.sub("", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


# ---- file systems

_systems: dict[str, Any] = {}
_systems_lock = threading.Lock()
_inherited: list[Any] = []  # of the parent


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.  Made by the process that uses it, and shared by its threads."""
    import fsspec

    store = "/".join(url.split("/", 3)[:3])
    with _systems_lock:
        system = _systems.get(store)
        if system is None:
            try:
                system, path = fsspec.core.url_to_fs(url)
            except ImportError as error:
                scheme = url.partition(":")[0].lower()
                package = next((name for name, schemes in _PACKAGES.items() if scheme in schemes.split()), None)
                remedy = f"pip install {package}" if package else "install its fsspec package"
                raise ValueError(f"shards {shown(url)!r}: {_line(error)}; {remedy}") from None
            if not system.async_impl:
                return system, path  # may not be safe to share: fsspec keeps one for every thread
            _systems[store] = system
    return system, system._strip_protocol(url)


def _call(system: Any, name: str, path: str, limit: float, *more: Any, **options: Any) -> Any:
    """A method of a file system, with a time limit where it is asynchronous; the others have limits of their own."""
    if system.async_impl:
        from fsspec.asyn import sync

        return sync(system.loop, getattr(system, "_" + name), path, *more, timeout=limit, **options)
    return getattr(system, name)(path, *more, **options)


def _forget() -> None:
    """In a forked child: connections, loops and locks are the parent's."""
    global _systems_lock
    # Never collected: their end would take the parent's sockets out of the epoll that parent and child share.
    _inherited.extend(_systems.values())
    _systems.clear()
    _systems_lock = threading.Lock()
    if "fsspec.asyn" in sys.modules:
        _inherited.extend(sys.modules["fsspec.asyn"].loop)
        sys.modules["fsspec.asyn"].reset_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
