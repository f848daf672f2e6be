"""ONNX files of a pretrained backbone, each compared with it before anybody may use it.

Needs the extra ``onnx``: onnx and onnxscript to write, onnxruntime to compare.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.pretrained.graphs import Kind, dynamic_shapes, example, export_graph
from mmssl.pretrained.model import Pool, Pretrained
from mmssl.pretrained.whole import first_line
from mmssl.types import Text

_OUTPUTS = ["tokens", "pooled"]
TOLERANCE = 1e-4  # of the largest feature
_INLINE = 2**31 - 2**24  # bytes: a protobuf file ends at 2 GiB


def check_packages() -> None:
    """Raises ValueError where the extra is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--onnx needs {', '.join(missing)}, which is not installed; pip install 'mmssl[onnx]'")


def write_onnx(model: Pretrained, folder: Path, kinds: Sequence[Kind], pool: Pool | None = None) -> None:
    """Write ``image.onnx``, ``text.onnx``, ``pair.onnx``, or those of ``kinds``, into a folder.

    Raises:
        ValueError: torch cannot export this backbone, or onnxruntime computes something else than torch.
    """
    for kind in kinds:
        path = folder / f"{kind}.onnx"
        try:
            with _quiet():
                _save(model, path, kind, pool)
        except (ValueError, OSError):
            raise  # pooling that the backbone has not; a full disk
        except Exception as error:  # versions that do not fit each other fail with anything
            raise ValueError(
                f"torch {torch.__version__} and onnxscript {version('onnxscript')} cannot write {path.name} of "
                f"{type(model.backbone.vit).__name__} ({first_line(error)}); try other versions, or leave --onnx out"
            ) from error
        _compare(model, path, kind, pool)


def _save(model: Pretrained, path: Path, kind: Kind, pool: Pool | None) -> None:
    inputs = example(model, kind, 2, 2)
    program = torch.onnx.export(
        export_graph(model, kind, pool),
        kwargs=inputs,
        dynamo=True,
        verbose=False,
        dynamic_shapes=dynamic_shapes(model, kind),  # again, for the names of the axes
        output_names=_OUTPUTS,
    )
    assert program is not None
    graph: Any = program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # stacks with the paths of this machine
    if kind != "image":
        graph.metadata_props["max_text_tokens"] = str(model.backbone.max_text_tokens)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(path, external_data=size > _INLINE)  # external: a file path.onnx.data beside


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(model: Pretrained, path: Path, kind: Kind, pool: Pool | None) -> None:
    """Run the file on two batches of different sizes and lengths."""
    longest = model.backbone.max_text_tokens
    batches = [example(model, kind, batch, min(longest, length)) for batch, length in ((1, 4), (3, 11))]
    for inputs, outputs in zip(batches, _run(path, batches), strict=True):
        for name, found, wanted in zip(_OUTPUTS, outputs, _reference(model, inputs, pool), strict=True):
            error = difference(found, wanted.cpu().numpy())
            if not error <= TOLERANCE:  # a NaN does not pass either
                raise ValueError(
                    f"{path.name} gives other {name} than torch {torch.__version__}: they differ by {error:.1g} of the "
                    f"largest, allowed is {TOLERANCE:g}; try other versions of onnxscript and onnxruntime, or export "
                    "without --onnx"
                )


def _run(path: Path, batches: list[dict[str, Tensor]]) -> list[list[np.ndarray]]:
    """What onnxruntime computes of each batch."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return [session.run(_OUTPUTS, {name: x.cpu().numpy() for name, x in inputs.items()}) for inputs in batches]
    except Exception as error:  # its errors have no base of their own
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} cannot run {path.name} ({first_line(error)}); try another version, "
            "or export without --onnx"
        ) from error


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a part of the largest value; infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _reference(model: Pretrained, inputs: dict[str, Tensor], pool: Pool | None) -> tuple[Tensor, Tensor]:
    """Tokens and pooled of the backbone as everybody calls it: texts packed."""
    text = None
    if "input_ids" in inputs:
        real = inputs["attention_mask"].bool()
        nothing = torch.empty(0, dtype=torch.int64, device=real.device)
        ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        text = Text(inputs["input_ids"][real], ends, real.shape[1], nothing, nothing)
    with torch.no_grad():
        encoded = model(inputs.get("pixels"), text, pool)
    return encoded.tokens, encoded.pooled
