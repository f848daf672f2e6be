"""What using a backbone costs: loading it and encoding with it against plain timm, and the memory of an export.

    python tools/bench_downstream.py [--model vit_base_patch16_224] [--rounds 5]

A random backbone of that size with text is saved as ``mmssl fit`` would, as one file and in shards, and exported.  Then
each in processes of its own, by turns:

- load: ``import mmssl; mmssl.load_backbone(export)`` against ``import timm; timm.create_model(name)`` with the image
  side's weights from a safetensors file; wall time of the whole process, less that of an empty Python.
- encode: pictures a second of ``encode_image`` on uint8 pictures against timm's ``forward_features`` on the same
  pictures normalised, in one process, by turns.
- export: the peak memory of ``mmssl export`` of the sharded checkpoint beyond that of its imports, by its model's size.
  Linux only.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import lightning
import timm
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, models, pre_tokenizers

import mmssl
import mmssl.export

LOAD = {
    "mmssl": "import mmssl; m = mmssl.load_backbone({export!r})",
    "timm": (
        "import timm; from safetensors.torch import load_file; "
        "m = timm.create_model({model!r}, num_classes=0); m.load_state_dict(load_file({image!r}), strict=False)"
    ),
    "empty": "pass",
}
ENCODE = """
import json, sys, time, timm, torch, mmssl
torch.manual_seed(0)
ours = mmssl.load_backbone({export!r}); theirs = timm.create_model({model!r}, num_classes=0).eval()
size = ours.img_size
pictures = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8)
mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (ours.backbone.pixel_mean, ours.backbone.pixel_std))
found = {{"mmssl": [], "timm": []}}
with torch.no_grad():
    for _ in range({rounds} + 1):
        begun = time.perf_counter(); ours.encode_image(pictures); found["mmssl"].append(time.perf_counter() - begun)
        begun = time.perf_counter(); theirs.forward_features((pictures.float() / 255 - mean) / std)
        found["timm"].append(time.perf_counter() - begun)
print(json.dumps({{name: times[1:] for name, times in found.items()}}))
"""
EXPORT = """
import re, mmssl.export, mmssl.pretrained.sharded
import timm
status = lambda name: int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
from pathlib import Path
mmssl.export.write_export({source!r}, Path({out!r}))
print(status("VmHWM") - before)
"""


def run(code: str) -> tuple[float, str]:
    """(seconds, what it printed) of a Python process."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return time.perf_counter() - begun, done.stdout


def save(folder: Path, name: str) -> tuple[Path, Path, int]:
    """(a run's folder, a sharded checkpoint, bytes of the backbone)."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {f"w{i}": i + 5 for i in range(30000)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    module = mmssl.MMM(str(folder / "tokenizer.json"), name)
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    (folder / "checkpoints").mkdir()
    trainer.save_checkpoint(folder / "checkpoints" / "step=00000001.ckpt")
    content = torch.load(folder / "checkpoints" / "step=00000001.ckpt", weights_only=True)
    sharded = folder.with_name("sharded.ckpt")
    state = content.pop("state_dict")
    moments = {f"{key}.{name}": torch.rand_like(value) for name, value in state.items() for key in ("m", "v")}
    dcp.save({"state_dict": state, "optimizer_0": moments}, checkpoint_id=str(sharded), no_dist=True)
    torch.save(content, sharded / "meta.pt")
    (sharded.parent / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    size = sum(p.numel() * 4 for p in module.network.backbone.parameters())
    return folder, sharded, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder, sharded, size = save(Path(home) / "run", options.model)
        export = Path(home) / "export"
        mmssl.export.write_export(folder, export)
        names = {"export": str(export), "model": options.model, "image": str(export / "model.safetensors")}
        times: dict[str, list[float]] = {name: [] for name in LOAD}
        for _ in range(options.rounds + 1):
            for name, code in LOAD.items():
                times[name].append(run(code.format(**names))[0])
        empty = median(times["empty"][1:])
        load = {name: median(times[name][1:]) - empty for name in ("mmssl", "timm")}
        encode = json.loads(run(ENCODE.format(rounds=options.rounds, **names))[1])
        peak = int(run(EXPORT.format(source=str(sharded), out=str(Path(home) / "out")))[1])
    speed = {name: 16 / median(times) for name, times in encode.items()}
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    print(f"{cpu and cpu[1]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__},")
    print(f"timm {timm.__version__}, mmssl {mmssl.__version__}, Python {platform.python_version()}")
    print(f"{options.model} with text, {size / 1e6:.0f} MB; {options.rounds} rounds")
    print(f"load    mmssl {load['mmssl']:.2f} s, timm {load['timm']:.2f} s: {load['mmssl'] / load['timm']:.2f} times")
    part = speed["mmssl"] / speed["timm"]
    print(f"encode  mmssl {speed['mmssl']:.1f} pictures/s, timm {speed['timm']:.1f}: {part:.2f} of it")
    print(f"export  {peak / 1e6:.0f} MB of memory: {peak / size:.2f} times the backbone")


if __name__ == "__main__":
    main()
