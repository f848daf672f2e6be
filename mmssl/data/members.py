"""Which members of a sample hold the picture, the text and the label (the img2dataset layout)."""

import json
from collections.abc import Iterable

from mmssl.types import BadSample, Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
TEXT_EXTENSIONS = ("txt", "json")  # json: its "caption", or else its "text"
LABEL_EXTENSIONS = ("cls", "json")
EXTENSIONS = {"image": IMAGE_EXTENSIONS, "text": TEXT_EXTENSIONS, "label": LABEL_EXTENSIONS}


def missing(needs: Iterable[str], extensions: Iterable[str]) -> list[str]:
    """What an objective needs ("image", "text", "label") and none of the extensions can give."""
    have = set(extensions)
    return [need for need in needs if not have.intersection(EXTENSIONS[need])]


def sample_image(sample: Sample) -> bytes:
    """The encoded picture.  Raises BadSample("no_image")."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample("no_image", f"members {', '.join(sorted(sample.members))}")


def sample_text(sample: Sample) -> str:
    """The text, stripped, without a byte order mark.

    Raises:
        BadSample: ``no_text`` (none, empty, or no string), ``not_utf8`` (also lone surrogates in a json),
            ``not_json``, or ``nul_in_text``: what a damaged disk leaves of a text, and no text holds otherwise.
    """
    try:
        if "txt" in sample.members:
            text: object = sample.members["txt"].decode("utf-8")
        elif "json" in sample.members:
            fields = json.loads(sample.members["json"].decode("utf-8").removeprefix("\ufeff"))
            if not isinstance(fields, dict):
                raise BadSample("no_text", f"the json is no object but a {type(fields).__name__}")
            text = fields.get("caption") or fields.get("text") or ""
            if isinstance(text, str):
                text.encode("utf-8")  # "\ud800" alone is valid JSON but no text
        else:
            raise BadSample("no_text", f"members {', '.join(sorted(sample.members))}")
    except UnicodeError as error:
        raise BadSample("not_utf8", str(error)) from error
    except (ValueError, RecursionError) as error:  # brackets nested a thousand deep; a number of 5,000 digits
        raise BadSample("not_json", str(error)) from error
    if not isinstance(text, str):
        raise BadSample("no_text", f"the caption is no string but a {type(text).__name__}")
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise BadSample("no_text", "empty")
    if "\0" in text:
        raise BadSample("nul_in_text", f"at character {text.index(chr(0))} of {len(text)}")
    return text
