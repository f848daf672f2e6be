"""Remote shards: a real HTTP server with the faults of real ones, and the S3 API of moto, on loopback."""

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from server import FileServer
from torch.utils.data import DataLoader
from toy_stream import ToyImage, ToyText, same, write_shards
from webdataset import TarWriter

from mmssl.data.cache import Cache
from mmssl.data.extents import Extents, cut
from mmssl.data.index import index_shard, index_shards
from mmssl.data.patterns import expand
from mmssl.data.remote import RemoteReader, Stat, fetch, is_remote, shown, stat
from mmssl.data.shards import ShardSet
from mmssl.data.stream import Source, TrainStream
from mmssl.data.tar import ShardError, scan


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MMSSL_REMOTE_TIMEOUT", "10")
    monkeypatch.setenv("MMSSL_REMOTE_ATTEMPTS", "3")
    monkeypatch.delenv("MMSSL_CACHE", raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "store").mkdir()
    with FileServer(tmp_path / "store") as running:
        yield running


def remote(server: FileServer, folder: Path, pattern: str = "{00000..00002}.tar", limit_gb: float = 1) -> ShardSet:
    return ShardSet(f"{server.url}/{pattern}", cache=Cache(str(folder), limit_gb))


def local(server: FileServer) -> ShardSet:
    return ShardSet(str(server.folder / "{00000..00002}.tar"))


def equal(one: ShardSet, other: ShardSet) -> bool:
    pairs = [(one.read(i), other.read(i)) for i in range(len(one))]
    return len(one) == len(other) and all(a.key == b.key and a.members == b.members for a, b in pairs)


# ---- reading


def test_remote_samples_are_the_local_ones(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 60, pictures=True)
    here, there = local(server), remote(server, tmp_path / "c")
    assert there.remote
    assert not here.remote
    assert there.fingerprint == here.fingerprint
    assert there.read(25).shard == f"{server.url}/00001.tar"
    assert equal(there, here)
    for group in (7, 20, 1000):
        there = remote(server, tmp_path / f"c{group}")
        there.group = group
        server.forget()
        assert equal(pickle.loads(pickle.dumps(there)), here)  # noqa: S301
        assert len(server.asked()) == {7: 11, 20: 3, 1000: 3}[group]  # cut at shards
        assert set(server.asked().values()) == {1}
    with pytest.raises(ValueError, match="group is 0"):
        there.group = 0


def test_a_rank_fetches_its_share_and_the_second_epoch_nothing(server: FileServer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(4):
        with TarWriter(str(server.folder / f"{shard:05d}.tar")) as writer:
            for i in range(1607):
                writer.write({"__key__": f"{shard * 1607 + i:06d}", "txt": b"t" * int(rng.integers(500, 3000))})
    size = sum(path.stat().st_size for path in server.folder.glob("*.tar"))
    batches = 6428 // 32
    ids: list[str] = []
    for rank in range(2):
        shards = remote(server, tmp_path / f"c{rank}", "{00000..00003}.tar")  # as on two nodes
        options = {"seed": 1, "batch_size": 32, "lanes": 2, "world": 2}
        stream = TrainStream([Source("a", shards)], ToyText(), rank=rank, **options)
        assert shards.group == stream.orders[0].block > 20
        assert 6428 / 2 / shards.group >= 24  # blocks a lane, of which those at its ends are cut
        ours = TrainStream([Source("a", ShardSet(str(server.folder)))], ToyText(), rank=rank, **options)
        server.forget()
        for number in range(batches):  # without looking ahead, into the next epoch
            batch = stream.batch(number)
            assert same(batch, ours.batch(number))
            ids += batch.keys
        assert server.sent() <= 1.05 * size / 2
        assert max(server.asked().values()) == 1
        everything = remote(server, tmp_path / f"c{rank}", "{00000..00003}.tar")
        everything.group = shards.group
        for i in range(6428):
            everything.read(i)
        server.forget()
        for number in range(batches, 3 * batches):
            assert same(stream.batch(number), ours.batch(number))
        assert server.requests == 0
    assert len(set(ids)) == 32 * batches


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_batches_are_equal_to_the_bit(server: FileServer, tmp_path: Path, workers: int, method: str | None) -> None:
    write_shards(server.folder, 96, pictures=True)
    options = {"seed": 3, "batch_size": 8, "lanes": 4}
    there = TrainStream([Source("a", remote(server, tmp_path / "c"))], ToyImage(), **options)
    here = TrainStream([Source("a", local(server))], ToyImage(), **options)
    loader = DataLoader(there, batch_size=None, num_workers=workers, multiprocessing_context=method)
    server.forget()
    for number, batch in zip(range(24), loader, strict=False):  # two epochs
        assert same(batch, here.batch(number))
    assert max(server.asked().values()) == 1


def _read_all(url: str, folder: str, group: int, first: int) -> None:
    shards = ShardSet(url, cache=Cache(folder, 1))
    shards.group = group
    shards.prefetch(range(first, len(shards)))
    for i in range(len(shards)):
        assert shards.read((i + first) % len(shards)).key == f"{(i + first) % len(shards):06d}"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_a_node_fetch_every_extent_once(server: FileServer, tmp_path: Path, method: str) -> None:
    write_shards(server.folder, 300)
    url = f"{server.url}/{{00000..00002}}.tar"
    ShardSet(url, cache=Cache(str(tmp_path / "c"))).read(0)  # this process has used its loop and its connections
    server.forget()
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=_read_all, args=(url, str(tmp_path / "c"), 10, at)) for at in (0, 0, 95, 250)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(server.asked()) == 30
    assert set(server.asked().values()) == {1}


def wait_for(server: FileServer, parts: int) -> None:
    end = time.monotonic() + 20
    while len(server.asked()) < parts and time.monotonic() < end:
        time.sleep(0.01)
    assert len(server.asked()) == parts


def test_prefetch_fetches_in_the_background(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 60)
    shards = remote(server, tmp_path / "c")
    shards.group = 10
    server.forget()
    shards.prefetch(range(25))
    wait_for(server, 3)  # before anything is read
    for i in range(25):
        shards.read(i)
    assert len(server.asked()) == 3
    assert max(server.asked().values()) == 1
    ShardSet(str(server.folder)).prefetch(range(60))  # nothing to do


def test_prefetch_fetches_whole_groups(server: FileServer, tmp_path: Path) -> None:
    """Over the ends of shards, and of the pieces that large samples are fetched in."""
    write_shards(server.folder, 60)  # 20 a shard
    shards = remote(server, tmp_path / "c")
    shards.group = 30
    server.forget()
    shards.prefetch([0])
    wait_for(server, 2)
    shards.prefetch([59])
    wait_for(server, 4)
    shards = remote(server, tmp_path / "small", limit_gb=4 * 5 * 2560 / 1e9)
    shards.group = 30
    assert shards._extents is not None
    pieces = len({shards._extents._extent(i // 20, i % 20) for i in range(30)})
    assert pieces == 6
    server.forget()
    shards.prefetch([0])
    wait_for(server, pieces)


def test_prefetch_goes_on_after_errors(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(server.folder, 60)
    shards = remote(server, tmp_path / "c")
    shards.group = 2
    tried: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Extents, "_get", lambda *arguments: tried.append(1) or 1 / 0)
        shards.prefetch(range(60))
        end = time.monotonic() + 20
        while len(tried) < 30 and time.monotonic() < end:
            time.sleep(0.01)
    server.forget()
    shards.prefetch(range(60))
    wait_for(server, 30)


def test_a_substitute_is_fetched_alone(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 60, pictures=True)
    here, shards = local(server), remote(server, tmp_path / "c")
    shards.group = 20
    server.forget()
    assert shards.read(33, alone=True).members == here.read(33).members
    assert server.sent() <= 512 * 8 + sum(map(len, here.read(33).members.values()))
    shards.read(0)
    requests = server.requests
    assert shards.read(5, alone=True).members == here.read(5).members  # with its neighbours, who are there
    assert remote(server, tmp_path / "c").read(5, alone=True).members == here.read(5).members
    assert len(server.asked()) <= 3
    assert requests > 0


def _read_and_end(url: str, folder: str) -> None:
    shards = ShardSet(url, cache=Cache(folder))
    shards.read(0)
    gc.collect()


def test_a_forked_reader_leaves_the_connections_of_its_parent_alone(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(server.folder, 60)
    monkeypatch.setenv("MMSSL_REMOTE_TIMEOUT", "4")
    monkeypatch.setenv("MMSSL_REMOTE_ATTEMPTS", "1")
    shards = remote(server, tmp_path / "c")
    for i in range(10):
        assert shards.read(i).key == f"{i:06d}"
        arguments = (f"{server.url}/00001.tar", str(tmp_path / f"c{i}"))
        process = multiprocessing.get_context("fork").Process(target=_read_and_end, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0
    shards.read(30)


def test_members_that_lie_apart_are_fetched_by_parts(server: FileServer, tmp_path: Path) -> None:
    """All pictures first, then all texts: an extent has two parts, and nothing between them is fetched."""
    big = os.urandom(20_000)
    with TarWriter(str(server.folder / "apart.tar")) as writer:
        for i in range(20):
            writer.write({"__key__": f"{i}", "jpg": big})
        for i in range(20):
            writer.write({"__key__": f"{i}", "txt": f"{i}".encode()})
    shards = remote(server, tmp_path / "c", "apart.tar")
    shards.group = 5
    server.forget()
    for i in range(5, 10):
        assert shards.read(i).members == {"jpg": big, "txt": f"{i}".encode()}
    assert len(server.asked()) == 2
    assert server.sent() <= 5 * (20_480 + 512 + 3 * 1024)  # with an extended header of 1 KiB for every member


def test_an_empty_member_at_the_end_of_a_part(server: FileServer, tmp_path: Path) -> None:
    """It has a header and no bytes: its place is where the next part begins, which is not fetched."""
    with TarWriter(str(server.folder / "apart.tar")) as writer:
        for i in range(20):
            writer.write({"__key__": f"{i}", "txt": b"" if i % 5 == 4 else b"t" * 5000})
        for i in range(20):
            writer.write({"__key__": f"{i}", "jpg": bytes(20_000)})
    shards = remote(server, tmp_path / "c", "apart.tar")
    shards.group = 5
    for i in range(20):
        assert shards.read(i).members == {"txt": b"" if i % 5 == 4 else b"t" * 5000, "jpg": bytes(20_000)}


def test_extents_read_over_small_gaps_only(tmp_path: Path) -> None:
    shard = index_shard(expand(write_shards(tmp_path, 1, shards=1))[0])
    offsets = np.array([512, 512 + 102_400, 512 + 204_800 + 3000 * 512])
    sizes = np.array([100_000, 101_000, 10])
    shard = type(shard)(**{**shard.__dict__, "tar_size": 1 << 30})
    assert cut(offsets, sizes, shard) == [
        (0, 102_400 + 512 + 101_376),
        (204_800 + 1_536_000, 204_800 + 1_536_000 + 1024),
    ]
    with pytest.raises(ShardError, match=r"its index .* is damaged"):
        cut(np.array([100]), np.array([5]), shard)
    with pytest.raises(ShardError, match=r"its index .* is damaged"):
        cut(np.array([512]), np.array([1 << 31]), shard)


def test_large_samples_make_smaller_extents_and_a_tiny_limit_works(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 60, pictures=True)
    folder = tmp_path / "c"
    shards = remote(server, folder, limit_gb=60_000 / 1e9)
    shards.group = 20
    assert equal(shards, local(server))
    sizes = [path.stat().st_size for path in folder.glob("*.mmssl")]
    assert 0 < sum(sizes) <= 60_000
    assert max(sizes) <= 15_000
    with pytest.warns(UserWarning, match=r"limit of 6e-05 GB is less than the .* GB in use at once"):
        shards.check_cache(100)


def test_open_pieces_are_bounded_and_deleted_ones_are_closed(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(server.folder, 60)
    size = sum(path.stat().st_size for path in server.folder.glob("*.tar"))
    shards = remote(server, tmp_path / "c", limit_gb=2 * size / 1e9)
    assert equal(shards, local(server))
    assert shards._extents is not None
    open_pieces = shards._extents._pieces
    assert 4 < len(open_pieces) < 60
    assert sum(piece.size for piece in open_pieces.values()) <= 2 * size / 16
    for path in (tmp_path / "c").glob("*.mmssl"):  # as another process that needs the room
        path.unlink()
    monkeypatch.setattr("mmssl.data.extents._LOOK_AGAIN", -1.0)
    shards.read(30)
    assert len(open_pieces) == 1


def test_an_unusable_cache_folder_costs_speed_only(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 30, pictures=True)
    (tmp_path / "file").touch()
    shards = remote(server, tmp_path / "file" / "cache")
    shards.group = 10
    server.forget()
    with pytest.warns(UserWarning, match="going on without a cache"):
        assert equal(shards, local(server))
    assert len(server.asked()) == 30  # sample by sample: no byte is fetched that is not read
    assert server.sent() <= sum(path.stat().st_size for path in server.folder.glob("*.tar"))


# ---- faults of servers


def test_faults_that_pass_are_waited_out(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(server.folder, 30, pictures=True)
    monkeypatch.setenv("MMSSL_REMOTE_TIMEOUT", "1")
    shards = remote(server, tmp_path / "c")
    shards.group = 10
    server.faults = {"00000.tar": [500, 503], "00001.tar": ["cut", 429], "00002.tar": ["stall", "cut"]}
    assert equal(shards, local(server))
    assert not any(server.faults.values())


def test_a_server_that_stays_silent_is_named(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(server.folder, 30)
    shards = remote(server, tmp_path / "c")
    monkeypatch.setenv("MMSSL_REMOTE_TIMEOUT", "0.3")
    monkeypatch.setenv("MMSSL_REMOTE_ATTEMPTS", "2")
    for fault, told in [("stall", "FSTimeoutError"), (500, "500"), ("cut", "ClientPayloadError")]:
        server.always = {"00001.tar": fault}
        with pytest.raises(ShardError, match=rf"00001\.tar: cannot be read, 2 attempts failed.*{told}") as caught:
            shards.read(10)
        assert "\n" not in str(caught.value)
    server.always = {}
    assert shards.read(10).members == {"txt": b"text 10"}  # a failure is not remembered


@pytest.mark.parametrize(
    ("fault", "message"), [(404, "not found; check the URL"), (403, "access is refused"), (418, "418")]
)
def test_final_answers_are_not_asked_for_again(server: FileServer, tmp_path: Path, fault: int, message: str) -> None:
    write_shards(server.folder, 30)
    shards = remote(server, tmp_path / "c")
    server.always = {"00001.tar": fault}
    server.forget()
    with pytest.raises(ShardError, match=rf"00001\.tar: .*{message}"):
        shards.read(10)
    assert server.requests == 1
    with pytest.raises(ShardError, match=rf"00001\.tar: .*{message}"):
        remote(server, tmp_path / "c")


def test_a_server_without_range_requests_is_refused(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 30)
    server.always = {".tar": "whole"}
    with pytest.raises(ShardError, match=r"sends whole files .*copy the shards to a local disk"):
        remote(server, tmp_path / "c")


def test_wrong_bytes_are_not_believed(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 30)
    shards = remote(server, tmp_path / "c")
    server.faults = {"00001.tar": ["wrong"]}
    with pytest.raises(ShardError, match=r"00001\.tar: changed since it was indexed, or damaged: no header of 000010"):
        shards.read(10)
    assert not list((tmp_path / "c").glob("*.mmssl"))
    assert shards.read(10).members == {"txt": b"text 10"}


@pytest.mark.parametrize("headers", [True, False])
def test_a_shard_that_changed_is_named(server: FileServer, tmp_path: Path, headers: bool) -> None:
    """Of the same size: by its ETag, or, where a server tells none, by the headers of its members."""
    server.headers = headers
    write_shards(server.folder, 30)
    shards = remote(server, tmp_path / "c")
    shards.group = 5
    shards.read(10)
    changed = (server.folder / "00001.tar").read_bytes().replace(b"000015.txt", b"000099.txt")
    sums = changed.index(b"000099.txt") + 148
    digits = f"{int(changed[sums : sums + 6], 8) + 9 + 9 - 1 - 5:06o}".encode()
    (server.folder / "00001.tar").write_bytes(changed[:sums] + digits + changed[sums + 6 :])
    with pytest.raises(ShardError, match=r"00001\.tar: changed since it was indexed"):
        shards.read(15)
    again = remote(server, tmp_path / "c")
    if headers:  # a new run indexes it anew, and does not take the old pieces for its own
        again.group = 5
        assert again.read(15).key == "000099"
        assert again.read(10).members == {"txt": b"text 10"}
    (server.folder / "00001.tar").write_bytes(changed + bytes(10240))
    with pytest.raises(ShardError, match=rf"changed since it was indexed \({len(changed) + 10240} bytes instead of"):
        shards.read(18)


# ---- the index


def test_a_sidecar_is_used_unless_it_is_older_than_the_tar(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 30, shards=1)
    tar = server.folder / "00000.tar"
    scanned = index_shard(f"{server.url}/00000.tar")
    assert server.sent() > 10_000
    index_shard(str(tar))  # beside, by a machine that has the tar
    server.forget()
    assert index_shard(f"{server.url}/00000.tar") == scanned  # from this machine's cache
    assert server.requests == 1
    for path in (tmp_path / "xdg").rglob("*.idx"):
        path.unlink()
    server.forget()
    index = index_shard(f"{server.url}/00000.tar")
    assert (index.digest, index.version, index.samples) == (scanned.digest, scanned.version, 30)
    assert server.sent() == 1  # the tar was asked for its size only
    sidecar = Path(f"{tar}.idx")
    os.utime(sidecar, (0, 1_000_000_000))
    for path in (tmp_path / "xdg").rglob("*.idx"):
        path.unlink()
    server.forget()
    assert index_shard(f"{server.url}/00000.tar").digest == scanned.digest
    assert server.sent() > 10_000
    sidecar.write_bytes(sidecar.read_bytes()[:-5])
    for path in (tmp_path / "xdg").rglob("*.idx"):
        path.unlink()
    assert index_shard(f"{server.url}/00000.tar").digest == scanned.digest


def test_scanning_skips_what_is_large(server: FileServer) -> None:
    with TarWriter(str(server.folder / "large.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i}", "bin": bytes(12 << 20), "txt": b"x"})
    assert index_shard(f"{server.url}/large.tar").samples == 4
    assert server.sent() < 3 << 20
    with TarWriter(str(server.folder / "small.tar")) as writer:
        for i in range(2000):
            writer.write({"__key__": f"{i}", "bin": bytes(5000)})
    server.forget()
    assert index_shard(f"{server.url}/small.tar").samples == 2000
    assert len(server.log) < 15


def test_damaged_and_missing_remote_shards_are_named(server: FileServer) -> None:
    write_shards(server.folder, 30)
    whole = (server.folder / "00001.tar").read_bytes()
    (server.folder / "00001.tar").write_bytes(whole[:3000])
    (server.folder / "empty.tar").touch()
    with pytest.raises(ShardError, match=rf"{server.url}/00001\.tar: cut off at byte 3000"):
        index_shards([f"{server.url}/{i:05d}.tar" for i in range(3)])
    with pytest.raises(ShardError, match=r"empty\.tar: is empty"):
        index_shard(f"{server.url}/empty.tar")
    with pytest.raises(ShardError, match=r"00009\.tar: not found"):
        ShardSet(f"{server.url}/{{00000,00009}}.tar")


def test_many_shards_are_indexed_side_by_side(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 30, shards=10)
    server.pause, server.always = 0.2, {".tar": "slow"}
    told: list[str] = []
    found = index_shards(
        [f"{server.url}/{i:05d}.tar" for i in range(10)], jobs=10, progress=lambda index: told.append(index.path)
    )
    assert server.most >= 5  # requests at once
    assert [index.path for index in found] == [f"{server.url}/{i:05d}.tar" for i in range(10)]
    assert sorted(told) == [index.path for index in found]


def test_a_query_stays_behind_the_name(server: FileServer) -> None:
    write_shards(server.folder, 30)
    index_shard(str(server.folder / "00000.tar"))
    signed = ShardSet(f"{server.url}/0000{{0..2}}.tar?signature=a%2Fb*")
    assert signed.read(29).members == {"txt": b"text 29"}
    assert signed.fingerprint == local(server).fingerprint
    assert any(name == "00000.tar.idx" for _, name, _, _ in server.log)


def test_secrets_of_urls_are_neither_told_nor_part_of_names(server: FileServer, tmp_path: Path) -> None:
    write_shards(server.folder, 30)
    url = server.url.replace("http://", "http://user:hidden@") + "/{00000..00002}.tar?X-Signature=hidden"
    cache = Cache(str(tmp_path / "c"))
    shards = ShardSet(url, cache=cache)
    assert [shards.read(i).shard for i in (0, 29)] == [f"{server.url}/00000.tar", f"{server.url}/00002.tar"]
    server.forget()
    renewed = ShardSet(url.replace("X-Signature=hidden", "X-Signature=renewed"), cache=cache)
    assert renewed.read(29).members == {"txt": b"text 29"}
    assert not server.asked()  # neither the shards nor their indexes
    for fault in (500, 403, 404, 418, "whole", "wrong", "cut"):
        server.always = {"00001.tar": fault}
        with pytest.raises(ShardError, match=r"00001\.tar: ") as caught:
            shards.read(10)
        assert "hidden" not in "".join(traceback.format_exception(caught.value)).replace("shards.py", "")
    with pytest.raises(ValueError, match="named twice") as twice:
        expand([f"{server.url}/a.tar?hidden", f"{server.url}/a.tar?hidden"])
    assert "hidden" not in str(twice.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://a:b@host/x/a.tar?sig=1&b=/c", "https://host/x/a.tar"),
        ("sftp://me:pass@word@host/a?.tar", "sftp://me@host/a?.tar"),
        ("abfs://container@account/a.tar", "abfs://container@account/a.tar"),
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("/a/b?c.tar", "/a/b?c.tar"),
        ("http://[::1]:9000/a.tar", "http://[::1]:9000/a.tar"),
    ],
)
def test_what_is_shown_of_a_url(url: str, told: str) -> None:
    assert shown(url) == told
    assert is_remote(url) == ("://" in url)


def test_an_ipv6_address_is_neither_a_chain_nor_a_glob() -> None:
    assert expand("http://[::1]:9000/{0..1}.tar") == [f"http://[::1]:9000/{i}.tar" for i in range(2)]
    with pytest.raises(ValueError, match="chained URLs"):
        is_remote("http://[::1]:9000/a.tar::http://b")


# ---- other stores


def test_memory_store_lists_globs_and_folders(tmp_path: Path) -> None:
    import fsspec

    write_shards(tmp_path / "s", 30)
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "s").glob("*.tar"):
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    names = [f"memory:///bucket/{i:05d}.tar" for i in range(3)]
    assert [name.replace("///", "//") for name in expand("memory://bucket/*.tar")] == [
        name.replace("///", "//") for name in names
    ]
    assert expand("memory://bucket/") == expand("memory://bucket/*.tar")
    shards = ShardSet("memory://bucket/", cache=Cache(str(tmp_path / "c")))
    assert equal(shards, ShardSet(str(tmp_path / "s")))
    assert store.exists("/bucket/00002.tar.idx")  # the store can be written to
    assert expand("memory://bucket/*") == expand("memory://bucket/*.tar")
    with pytest.raises(ValueError, match=r"no shard matches 'memory://bucket/x\*'"):
        expand("memory://bucket/x*")
    store.rm("/bucket", recursive=True)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """A client of moto's server; s3fs finds it as users' machines find theirs, by the environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setattr("mmssl.data.remote._systems", {})
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem(skip_instance_cache=True)
    client.mkdir("bucket")
    yield client
    moto.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3(s3: object, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", 60, pictures=True)
    s3.put(str(tmp_path / "s") + "/", "bucket/pairs/", recursive=True)  # type: ignore[attr-defined]
    here = ShardSet(str(tmp_path / "s"))
    assert expand("s3://bucket/pairs/") == [f"s3://bucket/pairs/{i:05d}.tar" for i in range(3)]
    assert expand("s3://bucket/pairs/0000[01].tar") == [f"s3://bucket/pairs/{i:05d}.tar" for i in range(2)]
    there = ShardSet("s3://bucket/pairs/{00000..00002}.tar", cache=Cache(str(tmp_path / "c")))
    assert s3.exists("bucket/pairs/00002.tar.idx")  # type: ignore[attr-defined]
    options = {"seed": 3, "batch_size": 8, "lanes": 4}
    far = TrainStream([Source("a", there)], ToyImage(), **options)
    near = TrainStream([Source("a", here)], ToyImage(), **options)
    for method in ("fork", "spawn"):
        loader = DataLoader(far, batch_size=None, num_workers=2, multiprocessing_context=method)
        for number, batch in zip(range(8), loader, strict=False):
            assert same(batch, near.batch(number))
    fresh = ShardSet("s3://bucket/pairs/{00000..00002}.tar", cache=Cache(str(tmp_path / "c2")))
    changed = (tmp_path / "s" / "00001.tar").read_bytes().replace(b"text 25", b"TEXT 25")
    s3.pipe_file("bucket/pairs/00001.tar", changed)  # type: ignore[attr-defined]
    with pytest.raises(ShardError, match=r"s3://bucket/pairs/00001\.tar: changed since it was indexed \(version"):
        fresh.read(25)
    again = ShardSet("s3://bucket/pairs/{00000..00002}.tar", cache=Cache(str(tmp_path / "c2")))  # not the old sidecar
    assert again.read(25).members["txt"] == b"TEXT 25"
    with pytest.raises(ShardError, match=r"s3://bucket/none\.tar: not found"):
        ShardSet("s3://bucket/none.tar")


def test_reading_stops_at_the_end(server: FileServer) -> None:
    (server.folder / "file").write_bytes(bytes(range(100)))
    known = stat(f"{server.url}/file")
    assert known.size == 100
    assert known.mtime > 0
    reader = RemoteReader(f"{server.url}/file", known)
    assert reader.pread(50, 80) == bytes(range(80, 100))
    assert reader.pread(10, 5) == bytes(range(5, 15))
    assert reader.pread(10, 100) == b""
    assert fetch(f"{server.url}/file", 3, 7, known) == bytes(range(3, 7))
    with pytest.raises(ShardError, match="100 bytes instead of 99"):
        fetch(f"{server.url}/file", 3, 7, Stat(99, "", 0))
    with pytest.raises(ShardError, match="a whole header is missing"):
        scan(reader, "file")
