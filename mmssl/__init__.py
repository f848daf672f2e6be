"""mmssl: masked self-supervised pretraining of one transformer on text, images and image-text pairs."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `import mmssl` and `mmssl --help` stay quick.
_HOME = {
    "MLM": "mmssl.objectives.mlm",
    "MAE": "mmssl.objectives.mae",
    "MMM": "mmssl.objectives.mmm",
    "ImageClassifier": "mmssl.finetune.classifiers",
    "TextClassifier": "mmssl.finetune.classifiers",
    "PairClassifier": "mmssl.finetune.classifiers",
    "DualEncoder": "mmssl.finetune.retrieval",
    "DataModule": "mmssl.data.datamodule",
    "FilesData": "mmssl.finetune.files",
    "Backbone": "mmssl.backbone",
    "FSDP": "mmssl.training.strategies",
    "load_backbone": "mmssl.pretrained",
    "Pretrained": "mmssl.pretrained",
    "SampleLedger": "mmssl.training.callbacks.ledger",
}
__all__ = [
    "FSDP",
    "MAE",
    "MLM",
    "MMM",
    "Backbone",
    "DataModule",
    "DualEncoder",
    "FilesData",
    "ImageClassifier",
    "PairClassifier",
    "SampleLedger",
    "TextClassifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmssl' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
