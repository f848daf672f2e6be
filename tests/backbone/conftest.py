"""Shape annotations of the backbone are checked in every test of this folder."""

from jaxtyping import install_import_hook

with install_import_hook("mmssl.backbone", "beartype.beartype"):
    import mmssl.backbone  # noqa: F401
