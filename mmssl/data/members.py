"""Which members of a sample hold the picture and the text (the img2dataset layout)."""

import json
from collections.abc import Iterable

from mmssl.types import BadSample, Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
TEXT_EXTENSIONS = ("txt", "json")  # json: its "caption", or else its "text"
EXTENSIONS = {"image": IMAGE_EXTENSIONS, "text": TEXT_EXTENSIONS}


def missing(needs: Iterable[str], extensions: Iterable[str]) -> list[str]:
    """What an objective needs ("image", "text") and none of the extensions can give."""
    have = set(extensions)
    return [need for need in needs if not have.intersection(EXTENSIONS[need])]


def sample_image(sample: Sample) -> bytes:
    """The encoded picture.  Raises BadSample("no_image")."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample("no_image", f"members {', '.join(sorted(sample.members))}")


def sample_text(sample: Sample) -> str:
    """The text, stripped.  Raises BadSample("no_text" or "not_utf8" or "not_json")."""
    try:
        if "txt" in sample.members:
            text: object = sample.members["txt"].decode("utf-8")
        elif "json" in sample.members:
            fields = json.loads(sample.members["json"].decode("utf-8"))
            text = fields.get("caption") or fields.get("text") if isinstance(fields, dict) else None
        else:
            raise BadSample("no_text", f"members {', '.join(sorted(sample.members))}")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", str(error)) from error
    except (json.JSONDecodeError, RecursionError) as error:  # brackets nested a thousand deep
        raise BadSample("not_json", str(error)) from error
    if not isinstance(text, str) or not text.strip():
        raise BadSample("no_text", "empty")
    return text.strip()
