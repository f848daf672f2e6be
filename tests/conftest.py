"""What holds for every test: shapes are checked at run time, one thread, no network, no W&B account."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ[_name] = _value
for _name in ("WANDB_API_KEY", "MMSSL_TRACEBACK"):
    os.environ.pop(_name, None)

# Before anything of mmssl is imported: from here on every jaxtyping annotation in it is checked.
assert "mmssl" not in sys.modules
from jaxtyping import install_import_hook  # noqa: E402

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for toy.py and typechecker.py
install_import_hook("mmssl", "typechecker.check")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_in_the_environment() -> Iterator[None]:
    """Lightning leaves LOCAL_RANK behind where it started a rank, and what a later test starts waits for others."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left a process group behind; decorate it with forks.in_a_fork")


@pytest.fixture(autouse=True)
def _no_network(_nothing_left_in_the_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that needs another machine is a mistake: it fails on somebody's train ride."""
    real: Callable[..., Any] = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network, and something connects to {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


TOY_CONFIG = """
model:
  class_path: toy.ToyModule
  init_args: {ratio: 0.5}
data: {class_path: toy.ToyData}
trainer: {max_steps: 20, log_every_n_steps: 5, val_check_interval: 10, accelerator: cpu, devices: 1, logger: false}
"""


@pytest.fixture
def toy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with toy.yaml, the config of a run that takes a moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    (tmp_path / "toy.yaml").write_text(TOY_CONFIG)
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A WordPiece tokenizer for the captions of pairs.py, small enough to split words."""
    from pairs import caption

    from mmssl.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([caption(i) for i in range(100)], vocab_size=120, path=path)
    return str(path)


@pytest.fixture(scope="session")
def pair_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 pairs in two shards."""
    from pairs import write_shards

    return write_shards(tmp_path_factory.mktemp("pairs"), 64)


@pytest.fixture(scope="session")
def joint_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str, pair_shards: str) -> Path:
    """A joint model with text experts, trained for four steps."""
    from pairs import TINY
    from runs import SMALL, train

    options = {**TINY, "experts": True, "drop_path_rate": 0.1}
    folder = tmp_path_factory.mktemp("joint") / "run"
    return train(folder, "MMM", pair_shards, tokenizer=tokenizer_path, max_tokens=12, backbone_options=options, **SMALL)


@pytest.fixture(scope="session")
def image_run(tmp_path_factory: pytest.TempPathFactory, pair_shards: str) -> Path:
    """A masked autoencoder, trained for four steps."""
    from runs import SMALL, train

    return train(tmp_path_factory.mktemp("image") / "run", "MAE", pair_shards, **SMALL)


@pytest.fixture(scope="session")
def onnx_export(joint_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command exports of the joint model, ONNX files among it; to be read only."""
    from mmssl.cli import main

    folder = tmp_path_factory.mktemp("onnx") / "out"
    assert main(["export", str(joint_run), "--out", str(folder), "--onnx"]) == 0
    return folder
