"""``mmssl export RUN --out DIR``: a folder that plain timm opens for the image side, and ``mmssl.load_backbone`` whole.

    model.safetensors   the image side under plain timm's names
    text.safetensors    what text adds, by the names of mmssl.Backbone (embeddings, experts); only where there is text
    config.json         timm's description of a model, and a section "mmssl"
    tokenizer.json      only where there is text, as its tokenizer_config.json and modeling_mmssl.py for transformers
    README.md           the model card
    image.onnx, text.onnx, pair.onnx    with --onnx, those that the run was trained for

Two files of weights, because timm loads ``model.safetensors`` strictly: a tensor that it does not know is an error.
"""

import csv
import inspect
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmssl import __version__
from mmssl.pretrained.graphs import Kind
from mmssl.pretrained.load import build
from mmssl.pretrained.model import Pool, Pretrained
from mmssl.pretrained.onnx import check_packages, write_onnx
from mmssl.pretrained.sources import (
    CONFIG_FILE,
    IMAGE_FILE,
    TEXT_FILE,
    TOKENIZER_FILE,
    Source,
    Weights,
    find_source,
    sha256,
    trained_on,
    two_sides,
)
from mmssl.pretrained.transformers_files import AUTO_MAP, CODE, CODE_FILE, TOKENIZER_CONFIG_FILE, tokenizer_config
from mmssl.pretrained.whole import FORMAT, CheckpointError, first_line

CARD_FILE = "README.md"
# What an export may write beside those files that every one has.
_OPTIONAL_FILES = {
    TEXT_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    CODE_FILE,
    *(f"{kind}.onnx{part}" for kind in get_args(Kind) for part in ("", ".data")),
}
_OWNER_AND_NAME = re.compile(r"(hf://)?[\w.-]+/[\w.-]+")


def export(
    run: str,
    out: str = "",
    weights: Weights = "online",
    onnx: bool = False,
    onnx_pool: Pool | None = None,
    push: str = "",
    public: bool = False,
    dry_run: bool = False,
) -> None:
    """Write a run's backbone to a folder that timm and mmssl.load_backbone open.

    Args:
        run: the run's folder, a checkpoint, or a sharded checkpoint's folder.
        out: the folder to write; must not exist.
        weights: online, or ema where the run kept an average.
        onnx: write image.onnx, text.onnx and pair.onnx as well, as far as the run was trained for them.
        onnx_pool: what "pooled" is in these files, cls or mean; by default the class token, or the mean without one.
        push: owner/name of a repository on the Hugging Face hub to upload the folder to; made if it does not exist.
        public: make the repository public, if it is made.
        dry_run: with --push, say what would be uploaded and upload nothing.

    Raises:
        ValueError: ``out`` is missing or exists, ``run`` cannot be loaded, or the hub refuses.
    """
    if not out:
        raise ValueError("where to is not said; give --out DIR, a folder that does not exist yet")
    if dry_run and not push:
        raise ValueError("--dry_run is about --push; give --push owner/name as well")
    if onnx_pool and not onnx:
        raise ValueError("--onnx_pool is about --onnx; give --onnx as well")
    if push:
        _check_repository(push)
    target = Path(out)
    write_export(run, target, weights, onnx, onnx_pool)
    print(f"{target}: {', '.join(path.name for path in sorted(target.iterdir()))}")
    print(f'  timm.create_model("local-dir:{target}", pretrained=True)\n  mmssl.load_backbone("{target}")')
    if push:
        upload(target, push, public, dry_run)


def write_export(
    run: str | Path, target: Path, weights: Weights = "online", onnx: bool = False, onnx_pool: Pool | None = None
) -> None:
    """Write the folder ``target``, whole or not at all.

    Raises:
        ValueError: ``target`` exists, ``run`` cannot be loaded, or ONNX files cannot be written or are not equal.
        CheckpointError: a checkpoint is damaged, or ``target`` cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists, and nothing is overwritten; remove it, or give another --out")
    if onnx:
        check_packages()
    found = find_source(run, weights)
    model = build(found)
    model.about = without_paths(model.about)
    model.tokenizer = model.tokenizer and model.tokenizer.wrapping()
    image, text = two_sides(model.backbone.state_dict())
    config = _config(model, found.backbone, found.options)
    _check_timm(config, image)
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        save_file(image, temporary / IMAGE_FILE, {"format": "pt"})
        if model.tokenizer is not None:
            save_file(text, temporary / TEXT_FILE, {"format": "pt"})
            (temporary / TOKENIZER_FILE).write_text(model.tokenizer.to_json(), encoding="utf-8")
            about_tokens = tokenizer_config(model.tokenizer, model.backbone.max_text_tokens)
            (temporary / TOKENIZER_CONFIG_FILE).write_text(json.dumps(about_tokens, indent=2) + "\n", encoding="utf-8")
            (temporary / CODE_FILE).write_text(CODE, encoding="utf-8")
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD_FILE).write_text(_card(model, config, _scores(found)), encoding="utf-8")
        if onnx:
            write_onnx(model, temporary, _kinds(model), onnx_pool)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            raise ValueError(f"{target} came into being meanwhile, and nothing is overwritten; give another --out")
        temporary.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(
            f"cannot write {target}: {first_line(error)}; see to space and rights there, or give another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config(model: Pretrained, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """config.json: timm's keys, and what ``load_backbone`` needs beside them."""
    backbone, size = model.backbone, model.img_size
    has_class = backbone.vit.cls_token is not None
    arguments = {
        "img_size": size,
        "patch_size": backbone.patch_size,
        **(options.get("options") or {}),
        "global_pool": "token" if has_class else "avg",
    }
    # The last norm stands before the pooling, as in pretraining; by default timm puts it behind where it pools by mean.
    known = inspect.signature(type(backbone.vit)).parameters
    arguments |= {key: False for key in ("fc_norm", "use_fc_norm") if key in known}
    about = {key: value for key, value in model.about.items() if key != "weights"}
    text = None
    if model.tokenizer is not None:
        text = {"vocab_size": model.tokenizer.vocab_size, "max_text_tokens": backbone.max_text_tokens}
    return {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "num_features": model.embed_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "mmssl",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(backbone.pixel_mean),
            "std": list(backbone.pixel_std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **({"auto_map": AUTO_MAP} if model.tokenizer else {}),
        "mmssl": {
            "format": FORMAT,
            "version": __version__,
            "backbone": name,
            "options": {
                **{key: value for key, value in options.items() if key not in ("drop_path_rate", "grad_checkpointing")},
                "img_size": size,
                "patch_size": backbone.patch_size,
            },
            "text": text,
            "weights": model.about["weights"],
            "has_text": model.tokenizer is not None,
            "tokenizer_sha256": None if model.tokenizer is None else sha256(model.tokenizer),
            "about": about,
        },
    }


def _check_timm(config: dict[str, Any], image: dict[str, Tensor]) -> None:
    """Raises ValueError unless plain timm, told what config.json says, builds a model with just these tensors."""
    with torch.device("meta"):
        plain = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    theirs = {name: value.shape for name, value in plain.state_dict().items()}
    if theirs != {name: value.shape for name, value in image.items()}:
        differ = sorted(set(theirs) ^ set(image)) or sorted(n for n in image if theirs[n] != image[n].shape)
        raise ValueError(
            f"plain timm {timm.__version__} builds another {config['architecture']} than the backbone "
            f"({', '.join(differ[:3])}); use the timm that trained it"
        )


def without_paths(value: Any) -> Any:
    """What is known of a run, of every path only its last part: an export tells nothing of the machine."""
    if isinstance(value, dict):
        return {key: without_paths(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inside) for inside in value]
    if isinstance(value, str) and not _OWNER_AND_NAME.fullmatch(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _scores(found: Source) -> list[str]:
    """A line for every validation metric of the checkpoint's run: its last value up to the checkpoint, and the step."""
    checkpoint, last_step = Path(found.where), found.about.get("step")
    path = checkpoint.parent.parent / "metrics.csv"
    if checkpoint.parent.name != "checkpoints" or not path.is_file() or last_step is None:
        return []
    content = path.read_text(encoding="utf-8", errors="replace")
    last: dict[str, str] = {}
    for row in csv.DictReader(content[: content.rfind("\n") + 1].splitlines()):  # the last line may be half written
        step = _number(row.pop("step", None))
        if step is None or step > last_step:
            continue
        values = {name: _number(cell) for name, cell in row.items() if str(name).startswith("val/")}
        last |= {name: f"- {name}: {v:.4g} (step {step:.0f})" for name, v in values.items() if v is not None}
    lines = list(last.values())
    if lines and found.averaged and found.weights == "online":
        lines = ["These are of the average of the weights, with which the run was validated:", "", *lines]
    return lines


def _number(cell: str | None) -> float | None:
    """The number in a cell; None for an empty or half-written one."""
    try:
        return float(cell or "")
    except ValueError:
        return None


def _card(model: Pretrained, config: dict[str, Any], scores: list[str]) -> str:
    """The model card; ``scores`` are lines."""
    about, text = model.about, model.tokenizer is not None
    sizes = f"{sum(p.numel() for p in model.backbone.parameters()) / 1e6:.1f} M parameters, {model.embed_dim} wide"
    facts = {
        "objective": about.get("objective") or "unknown",
        "architecture": f"`{config['architecture']}` of timm, {sizes}",
        "pictures": f"{model.img_size} x {model.img_size} pixels, patches of {model.backbone.patch_size}",
        "text": f"{model.backbone.max_text_tokens} tokens, vocabulary of {model.tokenizer.vocab_size}"
        if model.tokenizer
        else "none",
        "weights": about["weights"],
        "steps": about.get("step"),
        **{f"data: {name}": f"fingerprint {value}" for name, value in (about.get("data") or {}).items()},
        "mmssl": __version__,
    }
    seen = trained_on(about)
    front = {
        "library_name": "transformers" if text else "timm",
        "pipeline_tag": "image-feature-extraction" if "image" in seen else "feature-extraction",
        "tags": ["mmssl", "timm", "transformers", "masked-pretraining", *(["custom_code"] if text else [])],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", ""]
    lines += ["# Backbone pretrained with mmssl", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "Pixels in [0, 1] are normalised with the mean and std in config.json; there is no head.", ""]
    if not text:
        lines += ["It was pretrained on pictures alone.", ""]
    elif "image" not in seen:
        lines += ["It was pretrained on text alone: its patch embedding and its picture positions are untrained.", ""]
    lines += ["```python", "import mmssl, timm, transformers", ""]
    lines += ['model = mmssl.load_backbone("DIR")', "features = model.encode_image(pictures).pooled"]
    lines += ["features = model.encode_text(texts).pooled"] if text else []
    lines += ['image_side = timm.create_model("local-dir:DIR", pretrained=True)']
    lines += ['image_side = transformers.AutoModel.from_pretrained("DIR")  # and AutoImageProcessor']
    whole = 'model = transformers.AutoModel.from_pretrained("DIR", trust_remote_code=True)  # and AutoTokenizer; mmssl'
    lines += [whole, "```", ""] if text else ["```", ""]
    lines += ["## Scores on the run's validation data", ""]
    lines += scores or ["None was logged."]
    lines += [
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(about.get("recipe") or {}, sort_keys=False).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _kinds(model: Pretrained) -> tuple[Kind, ...]:
    """What the backbone was trained to encode."""
    if model.tokenizer is None:
        return ("image",)
    return ("image", "text", "pair") if "image" in trained_on(model.about) else ("text",)


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name}: a repository is named owner/name ({first_line(error)})") from error
    if "/" not in name:
        raise ValueError(f"--push {name}: a repository is named owner/name, and there is no owner")


def upload(folder: Path, repository: str, public: bool, dry_run: bool) -> None:
    """Upload an exported folder to the Hugging Face hub, or say what would be.

    Files that an earlier export left there and this one does not have, such as ONNX files of other weights, go.

    Raises:
        ValueError: no network, no login, or a refusal of the hub.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    files = sorted(path for path in folder.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    what = f"{len(files)} files, {size:.1f} MB, to {repository} ({'public' if public else 'private'} if new)"
    if dry_run:
        print(f"would upload {what}: {', '.join(path.name for path in files)}")
        return
    try:
        huggingface_hub.create_repo(repository, private=not public, exist_ok=True)
        gone = sorted(_OPTIONAL_FILES - {path.name for path in files})
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of mmssl", delete_patterns=gone
        )
    except (OSError, HfHubHTTPError.__bases__[0]) as error:  # the base: what its HTTP library raises without a network
        raise ValueError(
            f"--push {repository}: the hub did not take it ({first_line(error)}); {folder} is written and whole: "
            "check the network and your login (hf auth login)"
        ) from error
    print(f"uploaded {what}")
