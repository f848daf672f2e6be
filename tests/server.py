"""A small HTTP server on loopback, with range requests, and with the faults that real ones have."""

import hashlib
import re
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType


class FileServer:
    """Serves a folder.

    Attributes:
        log: (method, name, first byte, number of bytes sent) of every answer that carried a body.
        requests: number of requests.
        most: the largest number of requests that were answered at once.
        faults: by the end of a name, what the next requests for it meet, one after the other: a status such as 500,
            "whole" (no range support), "stall" (no answer for ``pause`` seconds), "cut" (half a body), "wrong" (other
            bytes), "slow" (waits ``pause`` seconds, then answers).
        always: like faults, for every request.
        headers: whether ETag and Last-Modified are sent.
    """

    def __init__(self, folder: Path, pause: float = 3.0) -> None:
        self.folder, self.pause = folder, pause
        self.log: list[tuple[str, str, int, int]] = []
        self.requests = self.most = self._running = 0
        self.faults: dict[str, list[int | str]] = {}
        self.always: dict[str, int | str] = {}
        self.headers = True
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                with outer._lock:
                    outer._running += 1
                    outer.most = max(outer.most, outer._running)
                try:
                    outer._answer(self)
                except OSError:  # the client has gone
                    self.close_connection = True
                finally:
                    with outer._lock:
                        outer._running -= 1

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self, ending: str = ".tar") -> int:
        """Bytes of the bodies of files with this ending."""
        return sum(size for _, name, _, size in self.log if name.endswith(ending))

    def asked(self, ending: str = ".tar") -> Counter[tuple[str, int]]:
        """How often each part, (name, first byte), was sent."""
        return Counter((name, first) for _, name, first, size in self.log if name.endswith(ending) and size > 1)

    def forget(self) -> None:
        self.log.clear()
        self.requests = 0

    def _fault(self, name: str) -> int | str | None:
        with self._lock:
            self.requests += 1
            for ending, faults in self.faults.items():
                if name.endswith(ending) and faults:
                    return faults.pop(0)
        return next((fault for ending, fault in self.always.items() if name.endswith(ending)), None)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/").partition("?")[0]
        fault = self._fault(name)
        path = self.folder / name
        if not path.is_file():
            fault = 404
        if fault in ("stall", "slow"):
            time.sleep(self.pause)
        if isinstance(fault, int):
            handler.send_response(fault)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        first, last = (int(part[1]), min(int(part[2]), len(data) - 1)) if part else (0, len(data) - 1)
        if fault == "whole":
            part, first, last = None, 0, len(data) - 1
        body = data[first : last + 1]
        if part and first >= len(data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(data)}")
        elif part:
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            handler.send_response(200)
        if self.headers:
            handler.send_header("ETag", '"' + hashlib.md5(data).hexdigest() + '"')
            handler.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if fault == "wrong":
            body = bytes(byte ^ 0x55 for byte in body)
        if fault == "cut":
            body = body[: len(body) // 2]
            handler.close_connection = True
        with self._lock:  # before it is sent: whoever has the answer finds it in the log
            self.log.append((handler.command, name, first, len(body)))
        handler.wfile.write(body)
