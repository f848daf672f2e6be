"""Every YAML in configs/ builds at its own size, and runs two steps at a reduced one through the real command.

Overlays are put behind a whole config; tests/training/test_strategies.py shows what they train.
"""

from pathlib import Path

import pytest
import torch
import yaml
from pairs import TINY

import mmssl
from mmssl.cli import main

HOME = Path(__file__).parents[1] / "configs"
# Those of fine-tuning begin with a pretrained backbone: tests/finetune/test_commands.py runs them.
CONFIGS = sorted(path for path in HOME.rglob("*.yaml") if path.parent.name not in ("finetune", "strategy"))
OVERLAYS = sorted((HOME / "strategy").glob("*.yaml"))
NAMES = [
    str(path.relative_to(path.parents[1] if path.parent.name == "configs" else path.parents[2])) for path in CONFIGS
]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_builds_at_its_own_size(path: Path, tokenizer_path: str) -> None:
    config = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    if "tokenizer" in arguments:
        arguments["tokenizer"] = tokenizer_path
    for name in ("mask_ratio", "text_mask_ratio", "crop_scale", "betas"):
        if isinstance(arguments.get(name), list):
            arguments[name] = tuple(arguments[name])
    module = getattr(mmssl, config["model"]["class_path"].split(".")[-1])(**arguments)
    backbone = module.network.backbone
    assert backbone.embed_dim % backbone.num_heads == 0
    if "demo" not in path.parts:
        assert (backbone.embed_dim, len(backbone.vit.blocks)) == (768, 12)
        assert config["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_runs_two_steps(
    path: Path, tokenizer_path: str, pair_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    tiny = TINY if config["model"]["class_path"] != "mmssl.MLM" else {"options": TINY["options"]}
    reduced = {
        "model.init_args.backbone": "vit_tiny_patch16_224",
        "model.init_args.backbone_options": yaml.safe_dump(tiny, default_flow_style=True).strip(),
        "model.init_args.warmup_steps": "1",
        "model.init_args.compile_blocks": "false",
        "data.train": pair_shards,
        "data.val": pair_shards,
        "data.batch_size": "8",
        "data.num_workers": "0",
        "data.val_samples": "8",
        "trainer.max_steps": "2",
        "trainer.accelerator": "cpu",
        "trainer.devices": "1",
        "trainer.precision": "32-true",
        "trainer.val_check_interval": "2",
        "trainer.log_every_n_steps": "1",
        "trainer.logger": "false",
    }
    if "tokenizer" in arguments:
        reduced["model.init_args.tokenizer"] = tokenizer_path
    if "decoder_embed_dim" in arguments:
        reduced |= {
            f"model.init_args.decoder_{k}": v for k, v in (("embed_dim", "32"), ("depth", "1"), ("num_heads", "4"))
        }
    options = [f"--{key}={value}" for key, value in reduced.items()]
    assert main(["fit", "--config", str(path), "--run", "run", *options]) == 0
    assert (tmp_path / "run/checkpoints/step=00000002.ckpt").is_file()
    assert list((tmp_path / "run/pictures").glob("*.png"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_an_overlay_trains_behind_a_config(
    overlay: Path, pair_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device here: the overlay's keys are read, and its strategy is what the Trainer gets."""
    monkeypatch.chdir(tmp_path)
    seen: list[type] = []
    monkeypatch.setattr(mmssl.MAE, "on_fit_start", lambda self: seen.append(type(self.trainer.strategy)), raising=False)
    reduced = {
        "model.init_args.backbone": "vit_tiny_patch16_224",
        "model.init_args.backbone_options": yaml.safe_dump(TINY, default_flow_style=True).strip(),
        "model.init_args.warmup_steps": "1",
        "data.train": pair_shards,
        "data.val": pair_shards,
        "data.batch_size": "8",
        "data.num_workers": "0",
        "data.val_samples": "8",
        "trainer.max_steps": "2",
        "trainer.accelerator": "cpu",
        "trainer.devices": "1",
        "trainer.val_check_interval": "2",
        "trainer.logger": "false",
    }
    options = [f"--{key}={value}" for key, value in reduced.items()]
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them: they go again with the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        code = main(["fit", "--config", str(HOME / "demo/mae.yaml"), "--config", str(overlay), "--run", "r", *options])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert code == 0
    wanted = yaml.safe_load(overlay.read_text())["trainer"]["strategy"]["class_path"].split(".")[-1]
    assert [kind.__name__ for kind in seen] == [wanted]
    assert any((tmp_path / "r" / "checkpoints").iterdir())
