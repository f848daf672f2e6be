"""Whether Weights & Biases can be had from here: W&B itself would try for a minute and a half."""

import netrc
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit


def why_not_online(seconds: float = 10.0, key_needed: bool = True) -> str | None:
    """Why nothing can be sent to W&B, in a few words; None if it looks as if it could."""
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if key_needed and not has_key(server):
        return "no API key: `wandb login` makes one"
    return unreachable(server, seconds)


def has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    default = Path("~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC") or (default if default.is_file() else "~/_netrc")).expanduser()
    try:
        found = netrc.netrc(str(path)).authenticators(urlsplit(server).netloc)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])


def unreachable(server: str, seconds: float) -> str | None:
    """Why ``server`` does not answer, or None when it does: W&B itself would try for a minute and a half."""
    if urlsplit(server).scheme not in ("http", "https"):
        return f"WANDB_BASE_URL {server!r} is not an http address"
    try:
        urllib.request.urlopen(server, timeout=seconds).close()
    except urllib.error.HTTPError:
        return None  # any answer is an answer
    except (OSError, ValueError) as error:
        return f"{server} does not answer: {getattr(error, 'reason', error)}"
    return None
