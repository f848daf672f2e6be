"""Each way out of an export works where only the packages are installed that docs/downstream.md names for it."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import Environment
from pairs import caption, picture

import mmssl
from mmssl.data.images import decode_image
from mmssl.pretrained.graphs import export_graph

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "downstream.md").read_text(encoding="utf-8")
NOT_MMSSL = {"lightning", "pytorch_lightning", "webdataset", "wandb", "torchmetrics", "jsonargparse", "transformers"}
COUNT = 3


@pytest.fixture(scope="module")
def home(joint_run: Path, onnx_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with exports/demo, a run, three pictures and their texts, and what mmssl makes of them."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(onnx_export, folder / "exports" / "demo")
    shutil.copytree(joint_run, folder / "run")
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.txt").write_text(caption(i))
    return folder


def named(path: str) -> list[str]:
    """The packages that the page says a path needs."""
    found = re.search(rf"^\| {re.escape(path)} \| `([^`]+)`", PAGE, re.M)
    assert found, f"docs/downstream.md does not say what {path!r} needs"
    return found[1].split()


def expected(home: Path) -> dict[str, torch.Tensor]:
    """Pooled features and tokens of the run itself."""
    backbone, pixels = mmssl.load_backbone(home / "run"), torch.stack([decode_image(picture(i)) for i in range(COUNT)])
    texts = [caption(i) for i in range(COUNT)]
    with torch.no_grad():
        every = {
            "image": backbone.encode_image(pixels),
            "text": backbone.encode_text(texts),
            "pair": backbone.encode_pair(pixels, texts),
        }
    parts = {
        f"{kind}.{part}": getattr(encoded, part) for kind, encoded in every.items() for part in ("tokens", "pooled")
    }
    return {"pixels": (pixels.float() / 255 - backbone.mean) / backbone.std, **parts}


def assert_equal(found: Path, wanted: dict[str, torch.Tensor], names: set[str], atol: float) -> None:
    arrays = np.load(found)
    assert set(arrays) == names
    for name in names:
        torch.testing.assert_close(torch.from_numpy(arrays[name]), wanted[name], rtol=0, atol=atol, msg=name)


TIMM = """
import numpy, timm, torch
model = timm.create_model("local-dir:exports/demo", pretrained=True).eval()
pixels = torch.from_numpy(numpy.load("pixels.npy"))
words = {name: torch.from_numpy(rows) for name, rows in numpy.load("words.npz").items()}
with torch.no_grad():
    found = {"image.tokens": model.forward_features(pixels), "image.pooled": model(pixels)}
    found["text.tokens"], found["text.pooled"] = torch.export.load("text.pt2").module()(**words)
numpy.savez("timm.npz", **{name: tensor.numpy() for name, tensor in found.items()})
"""


def test_plain_timm_and_a_graph(home: Path):
    """timm alone opens the image side, torch alone the graph of the text side."""
    wanted, backbone = expected(home), mmssl.load_backbone(home / "run")
    np.save(home / "pixels.npy", wanted["pixels"].numpy())
    rows = backbone.text([caption(i) for i in range(COUNT)])
    real = torch.arange(rows.max_seqlen) < rows.cu_seqlens.diff()[:, None]
    ids = torch.zeros(real.shape, dtype=torch.int64).masked_scatter(real, rows.input_ids)
    np.savez(home / "words.npz", input_ids=ids.numpy(), attention_mask=real.long().numpy())
    torch.export.save(export_graph(backbone, "text"), home / "text.pt2")

    environment = Environment(home / "timm", named("plain timm"))
    environment.run(TIMM, home, NOT_MMSSL | {"mmssl", "tokenizers", "simplejpeg", "onnx", "onnxruntime"})
    names = {"image.tokens", "image.pooled", "text.tokens", "text.pooled"}
    assert_equal(home / "timm.npz", wanted, names, 1e-6)


ONNX = """
from pathlib import Path
pictures = [Image.open(f"{i}.png") for i in range(3)]
texts = [Path(f"{i}.txt").read_text() for i in range(3)]
# ---
found = {"pair.tokens": tokens, "pair.pooled": pooled}
for kind, inputs in {"image": {"pixels": pixels}, "text": words}.items():
    path = f"exports/demo/{kind}.onnx"
    found[f"{kind}.tokens"], found[f"{kind}.pooled"] = onnxruntime.InferenceSession(path).run(None, inputs)
np.savez("onnx.npz", **found)
"""


def test_onnx_files_without_torch(home: Path):
    """The page's own lines, in an environment of five packages."""
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.split("\n## ONNX", 1)[1].split("\n## ", 1)[0], re.S)[:1]
    imports, rest = lines.split("\n\n", 1)
    environment = Environment(home / "onnx", named("ONNX files"))
    before, after = ONNX.split("# ---\n")
    environment.run(
        imports + before + rest + after, home, NOT_MMSSL | {"mmssl", "torch", "timm", "torchvision", "onnx"}
    )
    wanted = expected(home)
    assert_equal(home / "onnx.npz", wanted, set(wanted) - {"pixels"}, 1e-5)


TRANSFORMERS = """
import numpy
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
seen = AutoImageProcessor.from_pretrained("exports/demo")([Image.open(f"{i}.png") for i in range(3)])
encoded = AutoModel.from_pretrained("exports/demo")(**seen)
numpy.savez(
    "transformers.npz",
    **{"image.tokens": encoded.last_hidden_state.detach(), "image.pooled": encoded.pooler_output.detach()},
)
texts = [open(f"{i}.txt").read() for i in range(3)]
print(AutoTokenizer.from_pretrained("exports/demo")(texts, truncation=True)["input_ids"])
"""


def test_transformers_without_mmssl(home: Path):
    """The image side and the tokenizer."""
    environment = Environment(home / "transformers", named("transformers, image side and tokenizer"))
    said = environment.run(TRANSFORMERS, home, NOT_MMSSL - {"transformers"} | {"mmssl", "simplejpeg", "jaxtyping"})
    assert_equal(home / "transformers.npz", expected(home), {"image.tokens", "image.pooled"}, 1e-6)
    rows = mmssl.load_backbone(home / "run").text([caption(i) for i in range(COUNT)])
    assert list(itertools.chain(*json.loads(said.splitlines()[-1]))) == rows.input_ids.tolist()


MMSSL = """
import numpy, sys
from pathlib import Path
import mmssl
pictures = [Path(f"{i}.png").read_bytes() for i in range(3)]
texts = [Path(f"{i}.txt").read_text() for i in range(3)]
for place in ("run", "exports/demo"):
    backbone = mmssl.load_backbone(place)
    every = {
        "image": backbone.encode_image(pictures),
        "text": backbone.encode_text(texts),
        "pair": backbone.encode_pair(pictures, texts),
    }
    found = {f"{kind}.{part}": getattr(e, part).detach() for kind, e in every.items() for part in ("tokens", "pooled")}
    numpy.savez(f"mmssl-{place[:3]}.npz", **found)
from mmssl.export import write_export
try:
    write_export("run", Path("again"), onnx=True)
except ValueError as error:
    print(error)
assert not Path("again").exists()
write_export("run", Path("again"))
"""


def test_load_backbone_without_what_trains(home: Path):
    environment = Environment(home / "mmssl", named("`mmssl.load_backbone`"), [ROOT / "mmssl"])
    said = environment.run(MMSSL, home, NOT_MMSSL | {"onnx", "onnxscript", "onnxruntime", "matplotlib", "pandas"})
    assert said.strip().startswith("--onnx needs onnx, onnxscript, onnxruntime, which")
    wanted = expected(home)
    for place in ("run", "exp"):
        assert_equal(home / f"mmssl-{place}.npz", wanted, set(wanted) - {"pixels"}, 0)
    assert (home / "again" / "model.safetensors").read_bytes() == (
        home / "exports" / "demo" / "model.safetensors"
    ).read_bytes()


def test_an_environment_is_as_empty_as_it_says(tmp_path: Path):
    environment = Environment(tmp_path / "bare", ["jaxtyping"])
    environment.run("import jaxtyping", tmp_path, {"numpy", "torch", "mmssl", "pytest", "yaml"})
    with pytest.raises(AssertionError, match="these should not be here: \\['jaxtyping'\\]"):
        environment.run("", tmp_path, {"jaxtyping"})
