"""Checkpoints that all ranks write together: whole or absent, and gone on with by any number of ranks."""

import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from forks import ends, start, together
from full_disk import full_disk
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmssl.cli import main
from mmssl.pretrained.sharded import CHECKSUMS, META, TABLE, checksum, read_table
from mmssl.pretrained.whole import CheckpointError, damage_of, latest_checkpoint, read_checkpoint, step_of
from mmssl.training import in_place, sharded
from mmssl.training.checkpoint import AtomicCheckpointIO
from mmssl.training.reshard import load_sharded
from mmssl.training.sharded import write_sharded


class Net(nn.Module):
    """Odd sizes, so that ranks get unequal parts and some of them none; a buffer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 3, bias=False))
        self.head = nn.Linear(5, 3)
        self.head.weight = self.network[2].weight
        self.register_buffer("seen", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def made(world: int, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    if world:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(net, mesh=mesh)
    groups = [{"params": [p for p in net.parameters() if p.ndim == d], "weight_decay": 0.1 * d} for d in (2, 1)]
    return net, torch.optim.AdamW(groups, lr=0.01)


def steps(net: Net, optimizer: torch.optim.Optimizer, number: int) -> None:
    for _ in range(number):
        torch.manual_seed(9)
        net(torch.randn(6, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def content_of(net: Net, optimizer: torch.optim.Optimizer) -> dict:
    return {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "global_step": 2,
        "rng": [torch.arange(3), {"words": (1, 2.5, None)}],
    }


def plain(value):
    """Every tensor whole, on all ranks."""
    if isinstance(value, torch.Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def assert_same(one, other) -> None:
    assert type(one) is type(other) or (isinstance(one, dict) and isinstance(other, dict)), (type(one), type(other))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a sharded checkpoint of two ranks, and what it should hold: whole.pt, later.pt."""
    run = tmp_path_factory.mktemp("sharded")

    def save(rank: int) -> None:
        net, optimizer = made(2)
        steps(net, optimizer, 2)
        write_sharded(content_of(net, optimizer), run / "checkpoints" / "step=00000002.ckpt")
        whole = plain(content_of(net, optimizer))
        steps(net, optimizer, 1)
        later = plain(net.state_dict())
        if rank == 0:
            torch.save(whole, run / "whole.pt")
            torch.save(later, run / "later.pt")

    together(2, run / "meet", save)
    return run


def folder_of(run: Path) -> Path:
    return run / "checkpoints" / "step=00000002.ckpt"


def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of(saved), tmp_path / "step=00000002.ckpt"))


def test_a_folder_holds_what_a_file_holds(saved: Path):
    """Weights, buffers, optimizer state by numbers, schedules, generators: in one process as if it had trained."""
    folder = folder_of(saved)
    assert {path.name for path in folder.iterdir()} == {"__0_0.distcp", "__1_0.distcp", META, TABLE, CHECKSUMS}
    assert damage_of(folder) is None
    assert latest_checkpoint(saved) == folder
    loaded = AtomicCheckpointIO().load_checkpoint(folder)
    assert_same(loaded, torch.load(saved / "whole.pt", weights_only=True))

    net, optimizer = made(0, seed=5)
    net.load_state_dict(loaded["state_dict"])
    optimizer.load_state_dict(loaded["optimizer_states"][0])
    steps(net, optimizer, 1)
    for name, value in torch.load(saved / "later.pt", weights_only=True).items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_any_number_of_ranks_goes_on(saved: Path, tmp_path: Path, world: int, kind: str):
    path = folder_of(saved)
    if kind == "file":
        path = tmp_path / "step=00000002.ckpt"
        AtomicCheckpointIO().save_checkpoint(read_checkpoint(folder_of(saved)), path)

    def load(rank: int) -> None:
        net, optimizer = made(world, seed=rank + 5)
        content = load_sharded(path, net, [optimizer])
        assert content["global_step"] == 2
        assert_same(content["rng"], content_of(net, optimizer)["rng"])
        assert_same(plain(content_of(net, optimizer)), torch.load(saved / "whole.pt", weights_only=True))
        steps(net, optimizer, 1)
        later = torch.load(saved / "later.pt", weights_only=True)
        if world < 3:  # a third of the sum of three is not always what one was
            assert_same(plain(net.state_dict()), later)
        torch.testing.assert_close(plain(net.state_dict()), later, rtol=1e-5, atol=1e-6)

    together(world, tmp_path / "meet", load)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", META, TABLE, CHECKSUMS])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_of_any_file_is_found(saved: Path, tmp_path: Path, name: str, damage: str):
    folder = copied(saved, tmp_path)
    data = bytearray((folder / name).read_bytes())
    if damage == "gone":
        (folder / name).unlink()
    else:
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data if damage == "flipped" else data[:-1])
    assert damage_of(folder) is not None
    assert "\n" not in damage_of(folder)
    with pytest.raises(CheckpointError, match="cannot load"):
        AtomicCheckpointIO().load_checkpoint(folder)


def test_damage_is_passed_over_and_set_aside(saved: Path, tmp_path: Path):
    folder = copied(saved, tmp_path)
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "step=00000001.ckpt")
    (folder / "__1_0.distcp").write_bytes(b"")
    said: list[str] = []
    assert latest_checkpoint(tmp_path, say=said.append, set_aside=True).name == "step=00000001.ckpt"
    assert "__1_0.distcp" in said[0]
    copied(saved, tmp_path)
    (folder / META).write_bytes(b"")
    latest_checkpoint(tmp_path, say=said.append, set_aside=True)  # the name .damaged is taken by a folder
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == ["step=00000001.ckpt", "step=00000002.ckpt.damaged", "step=00000002.ckpt.damaged.2"]


def test_a_table_that_runs_code_is_refused(saved: Path, tmp_path: Path):
    folder = copied(saved, tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / TABLE).write_bytes(pickle.dumps(Evil()))
    content = json.loads((folder / CHECKSUMS).read_text())
    content["files"][TABLE] = checksum(folder / TABLE)
    (folder / CHECKSUMS).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_table_that_python_3_13_wrote(saved: Path, tmp_path: Path, monkeypatch):
    """It pickles a Path as ``pathlib._local.PosixPath``, a name that older versions do not have."""
    folder = copied(saved, tmp_path)
    table = read_table(folder)
    local = ModuleType("pathlib._local")
    local.PosixPath = type("PosixPath", (PurePosixPath,), {"__module__": "pathlib._local"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pathlib._local", local)
        table.storage_meta.checkpoint_id = local.PosixPath("/a/b")
        (folder / TABLE).write_bytes(pickle.dumps(table))
    assert b"pathlib._local" in (folder / TABLE).read_bytes()
    assert read_table(folder).storage_meta.checkpoint_id == PurePosixPath("/a/b")


def test_a_checkpoint_that_does_not_fit_is_one_line_on_all_ranks(saved: Path, tmp_path: Path):
    def load(rank: int) -> None:
        net, optimizer = made(2)
        net.register_buffer("more", torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"does not fit the model.*it lacks more"):
            load_sharded(folder_of(saved), net, [optimizer])
        net, optimizer = made(2)
        net.seen = torch.zeros(2)
        with pytest.raises(CheckpointError, match=r"seen is \(4,\) there and \(2,\)"):
            load_sharded(folder_of(saved), net, [optimizer])
        net, optimizer = made(2)
        path = folder_of(saved) if rank == 0 else tmp_path / "other"  # rank 0's counts
        assert load_sharded(path, net, [optimizer])["global_step"] == 2

    together(2, tmp_path / "meet", load)


def test_a_disk_that_is_full_for_one_rank_fails_all(tmp_path: Path):
    """A limit on the size of a file in rank 1 stands for its full disk; the ranks raise, and the older one stays."""
    path = tmp_path / "checkpoints" / "step=00000002.ckpt"

    def save(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        content = {"state_dict": {"w": distribute_tensor(torch.zeros(60_000), mesh, [Shard(0)])}, "global_step": 2}
        write_sharded(content, path)
        before = path.stat().st_ino
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(CheckpointError, match=r"cannot save .*disk full.*earlier checkpoints are untouched"):
            write_sharded(content, path)
        dist.barrier()
        assert path.stat().st_ino == before
        assert damage_of(path) is None
        assert os.listdir(path.parent) == [path.name]
        with pytest.raises(CheckpointError, match="Not a directory"):
            write_sharded(content, path / META / "below" / "a" / "file")

    together(2, tmp_path / "meet", save)


def test_a_value_that_could_not_be_loaded_is_refused_when_saved(tmp_path: Path):
    def save(rank: int) -> None:
        with pytest.raises(CheckpointError, match="neither a tensor nor plain Python"):
            write_sharded({"state_dict": {"w": torch.zeros(3)}, "folder": Path("x")}, tmp_path / "run" / "a.ckpt")
        dist.barrier()
        assert os.listdir(tmp_path / "run") == []

    together(2, tmp_path / "meet", save)


def test_ranks_on_other_disks_are_told(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mmssl.training.sharded.SECONDS_TO_APPEAR", 0.2)

    def save(rank: int) -> None:
        if rank == 0:  # does not see what rank 1 wrote
            real = sharded._size
            sharded._size = lambda path: -1 if path.name.startswith("__1") else real(path)
        mesh = init_device_mesh("cpu", (2,))
        content = {"state_dict": {"w": distribute_tensor(torch.zeros(6), mesh, [Shard(0)])}}
        with pytest.raises(CheckpointError, match=r"does not see __1_0\.distcp of another rank"):
            write_sharded(content, tmp_path / "a.ckpt")

    together(2, tmp_path / "meet", save)


def test_a_rank_that_dies_leaves_no_other_waiting(tmp_path: Path):
    def save(rank: int) -> None:
        write_sharded({"state_dict": {"w": torch.zeros(3)}}, tmp_path / "a.ckpt")
        if rank == 1:
            os._exit(9)
        write_sharded({"state_dict": {"w": torch.ones(3)}}, tmp_path / "a.ckpt")

    assert ends(start(2, tmp_path / "meet", save)) == [1, 9]
    assert read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("exchanges", [True, False])
def test_one_takes_another_s_place(saved: Path, tmp_path: Path, monkeypatch, exchanges: bool):
    """A folder a folder's, a file a folder's and a folder a file's, also where names cannot be exchanged."""
    if not exchanges:
        monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
    path = tmp_path / "step=00000002.ckpt"
    for _ in range(2):
        in_place.put_in_place(Path(copied(saved, tmp_path / "new")), path)
        assert step_of(path) == 2
        assert damage_of(path) is None
        AtomicCheckpointIO().save_checkpoint({"global_step": 7}, path)
        assert read_checkpoint(path) == {"global_step": 7}
        (tmp_path / "new").rmdir()
    assert os.listdir(tmp_path) == [path.name]


def test_a_kill_between_two_renames_is_mended(saved: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
    path, new = copied(saved, tmp_path), copied(saved, tmp_path / "new")
    real, renames = os.rename, []

    def rename(one: Path, other: Path) -> None:
        renames.append(other)
        if len(renames) == 2:
            raise KeyboardInterrupt  # as a kill would end it
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        in_place.put_in_place(new, path)
    assert not path.exists()
    monkeypatch.setattr(os, "rename", real)
    assert latest_checkpoint(tmp_path, set_aside=True) == path


def test_consolidate_on_a_full_disk(saved: Path, tmp_path: Path, capsys):
    with full_disk(2_000):
        assert main(["consolidate", str(saved), "--out", str(tmp_path / "one.ckpt")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot write {tmp_path}/one.ckpt: " in line
    assert line.endswith("; see to space and rights there, or give another --out")
    assert not any("one.ckpt" in path.name for path in tmp_path.iterdir())


def test_consolidate(saved: Path, tmp_path: Path, capsys):
    out = tmp_path / "one.ckpt"
    assert main(["consolidate", str(saved), "--out", str(out)]) == 0
    assert "step 2 of" in capsys.readouterr().out
    assert_same(torch.load(out, weights_only=True), torch.load(saved / "whole.pt", weights_only=True))
    for arguments, said in (
        ([str(saved), "--out", str(out)], "exists, and nothing is overwritten"),
        ([str(saved)], "give --out FILE.ckpt"),
        ([str(out), "--out", str(tmp_path / "two.ckpt")], "is one file already"),
        ([str(tmp_path / "nothing"), "--out", str(tmp_path / "two.ckpt")], "there is no"),
    ):
        assert main(["consolidate", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["one.ckpt"]
