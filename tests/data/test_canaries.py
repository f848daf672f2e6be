"""Data never runs code and never writes outside: whatever names a shard, and whatever lies in one.

The whole path runs in a process of its own, in which Python itself reports every program that is started and every
class that is unpickled.
"""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pairs import caption, picture

from mmssl.cli import main
from mmssl.data.datamodule import DataModule
from mmssl.data.patterns import expand
from mmssl.data.shards import ShardSet
from mmssl.data.tokenizer import TextTokenizer

NAMES = [
    "pipe:touch canary",
    "PIPE:touch canary",
    "pipe:touch canary; cat a.tar",
    " pipe:touch canary",
    "pipe://touch canary",
    "{pipe:touch canary}",
    "{pipe:touch canary,a}.tar",
    "{pipe,file}:touch canary",
    "file:pipe:touch canary",
    "file://a.tar::pipe:touch canary",
    "simplecache::pipe:touch canary",
    "simplecache::file://a.tar",
    "zip://a.tar::pipe:touch canary",
    "tar://a::file://a.tar",
    "reference://a.tar",
    "python:open('canary', 'w')",
    "jupyter://touch canary",
    "git://a.tar",
    "github://a:b@c/a.tar",
    "dask://a.tar",
    "generic://a.tar",
    "exec:touch canary",
    "| touch canary",
    "`touch canary`",
    "$(touch canary).tar",
    "a.tar; touch canary",
    "--checkpoint-action=exec=touch canary",
    "-",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, deep enough that ../ of it is the test's own."""
    folder = tmp_path / "work" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def canaries(folder: Path) -> list[Path]:
    return [path for path in folder.parents[1].rglob("*") if "canary" in path.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_shard_starts_nothing(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for shards in (name, [name], ["a.tar", name]):
        with pytest.raises(ValueError, match="shard"):
            ShardSet(shards)
    for argument in (["shards", "index"], ["shards", "check"], ["shards", "stats"], ["tokenizer", "train"]):
        code = main([*argument, "--", name] if name.startswith("-") else [*argument, name])
        assert code not in (0, 1), argument  # refused, and no traceback
        told = capfd.readouterr().err
        assert "Traceback" not in told
    for data in (
        lambda: DataModule(name, batch_size=1),
        lambda: DataModule([name], batch_size=1),
        lambda: DataModule({"a": {"shards": [name]}}, batch_size=1),
        lambda: DataModule("a.tar", val=name, batch_size=1),
    ):
        with pytest.raises(ValueError, match="shard"):
            data().prepare_data()
    assert canaries(here) == []


@pytest.mark.parametrize("name", ["pipe:touch canary", "PIPE:touch canary", "pipe://touch canary", "exec:touch canary"])
def test_a_scheme_that_runs_programs_is_refused_as_such(name: str, here: Path) -> None:
    (here / name.partition("/")[0]).touch()  # not even a file of this name is meant
    with pytest.raises(ValueError, match=r"would run a command|scheme"):
        expand(name)


def test_fit_with_a_pipe_in_its_config_starts_nothing(
    here: Path, tokenizer_path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model": {"class_path": "mmssl.MLM", "init_args": {"tokenizer": tokenizer_path}},
        "data": {"class_path": "mmssl.DataModule", "init_args": {"train": "pipe:touch canary", "batch_size": 1}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "logger": False},
    }
    (here / "run.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "run.yaml", "--run", "runs/a"]) == 2
    assert "pipe: would run a command" in capfd.readouterr().err
    assert canaries(here) == []


class Payload:
    """Touches the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch canary",)


PICKLE = pickle.dumps(Payload())
CODE = b"open('canary', 'w')\n"
EVIL = {
    **dict.fromkeys(["pkl", "pickle", "pyd", "pth", "pt", "ckpt", "npy", "cls", "ten", "mp", "dill"], PICKLE),
    **dict.fromkeys(["py", "pyc", "sh", "exe", "so"], CODE),
    "yaml": b"!!python/object/apply:os.system ['touch canary']",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\n",
}


def evil_shard(path: Path, secret: Path) -> None:
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), type, link
            info.mode = 0o777
            archive.addfile(info, io.BytesIO(content))

        for i in range(8):
            add(f"{i:06d}.png", picture(i))
            add(f"{i:06d}.txt", caption(i).encode())
            for extension, content in EVIL.items():
                add(f"{i:06d}.{extension}", content)
        for name in ("../canary.txt", "../../canary.txt", "x/../../canary.txt", str(secret.parent / "canary.txt")):
            add(name, b"a red square")
        add("$(touch canary).txt", b"a red square")
        add("`touch canary`;touch canary|touch canary.txt", b"a red square")
        add("link.txt", type=tarfile.SYMTYPE, link=str(secret))
        add("relative.txt", type=tarfile.SYMTYPE, link="../" * 20 + str(secret)[1:])
        add("hard.txt", type=tarfile.LNKTYPE, link=str(secret))
        add("device.txt", type=tarfile.CHRTYPE)
        add("block.txt", type=tarfile.BLKTYPE)
        add("fifo.txt", type=tarfile.FIFOTYPE)
        add("folder", type=tarfile.DIRTYPE)


# Everything that is imported comes first: importing runs code, of installed packages.
WATCHED = """
import sys
sys.path[:0] = {paths!r}
import mmssl, json, os, torch
from pathlib import Path
from pairs import TINY
from mmssl.data.shards import ShardSet
from mmssl.data.stream import EvalSet, Source, TrainStream
from mmssl.data.tokenizer import train_from_shards
from mmssl.cli import main
import mmssl.cli.shards
decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
prepare = mmssl.MMM({tokenizer!r}, "vit_tiny_patch16_224", TINY, max_tokens=32, **decoder).prepare(True)
WATCH = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen")
told = []
sys.addaudithook(lambda event, arguments: told.append((event, str(arguments))) if event in WATCH else None)
shards = ShardSet("evil.tar")
samples = [shards.read(i) for i in range(len(shards))]
options = dict(seed=0, batch_size=len(shards), bad_samples="bad_samples.jsonl")
TrainStream([Source("a", shards)], prepare, lanes=1, **options).batch(0)
EvalSet(shards, prepare, **options).batch(0)
train_from_shards("evil.tar", "made.json", vocab_size=200)
train_from_shards("evil.tar", "unigram.json", vocab_size=60, model="unigram")
codes = [main(["shards", command, "evil.tar"]) for command in ("index", "check", "stats")]
print(json.dumps([told, [s.key for s in samples], [v.decode("latin-1") for s in samples for v in s.members.values()]]))
"""


def test_what_lies_in_a_shard_is_never_run_unpickled_or_written(here: Path, tokenizer_path: str) -> None:
    secret = here.parent / "secret.txt"
    secret.write_text("the secret of another folder")
    evil_shard(here / "evil.tar", secret)
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    script = WATCHED.format(paths=paths, tokenizer=tokenizer_path)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told, keys, contents = json.loads(ran.stdout.splitlines()[-1])
    assert told == []
    assert canaries(here) == []
    assert len([key for key in keys if key.startswith("0")]) == 8
    assert "$(touch canary)" in keys  # a name like any other
    assert all("secret" not in content for content in contents)
    assert {"link", "relative", "hard", "device", "block", "fifo"}.isdisjoint(keys)
    assert {path.name for path in here.iterdir()} == {
        "evil.tar",
        "evil.tar.idx",
        "bad_samples.jsonl",
        "made.json",
        "unigram.json",
    }
    assert {path.name for path in here.parent.iterdir()} == {"here", "secret.txt"}


def test_the_payload_bites(here: Path) -> None:
    """Or the test above would show nothing."""
    pickle.loads(PICKLE)  # noqa: S301
    assert canaries(here) == [here / "canary"]


def test_an_index_or_a_tokenizer_of_pickled_bytes_is_not_loaded(here: Path) -> None:
    evil_shard(here / "evil.tar", here)
    Path("evil.tar.idx").write_bytes(PICKLE)
    assert len(ShardSet("evil.tar")) > 8  # made again
    Path("tokenizer.json").write_bytes(PICKLE)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a Hugging Face tokenizer|tokenizer\.json"):
        TextTokenizer("tokenizer.json")
    assert canaries(here) == []
