"""Every odd text, member and shard has the outcome that docs/bad-input.md lists, seen through the real path (see
odd.py)."""

import json
import os
import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from odd import DECODER, PHOTO, check_bad, one_epoch, pairs_with, tar
from pairs import TINY, caption, picture

import mmssl
from mmssl.data.budget import Budget, TooManyBadSamples
from mmssl.data.datamodule import DataModule
from mmssl.data.loader import Loader
from mmssl.data.shards import ShardSet
from mmssl.data.stream import EvalSet, Source, TrainStream
from mmssl.data.tar import ShardError
from mmssl.training.callbacks.predictions import Predictions
from mmssl.types import Prepare

# ---- texts

LONG = " ".join(caption(i) for i in range(20_000)).encode()[: 1 << 20]
BAD_TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("txt", b"", "no_text"),
    "blank": ("txt", b" \t\r\n \xc2\xa0", "no_text"),
    "only control characters": ("txt", b"\x01\x02\x7f", "no_text"),
    "only a byte order mark": ("txt", b"\xef\xbb\xbf", "no_text"),
    "zeros, as a crashed disk leaves them": ("txt", bytes(512), "nul_in_text"),
    "a nul inside": ("txt", b"a red \0 square", "nul_in_text"),
    "latin-1": ("txt", "ein grünes Quadrat".encode("latin-1"), "not_utf8"),
    "utf-16": ("txt", "a red square".encode("utf-16"), "not_utf8"),
    "a surrogate in utf-8": ("txt", b"a \xed\xa0\x80 square", "not_utf8"),
    "a cut character": ("txt", "a red ü".encode()[:-1], "not_utf8"),
    "a jpeg": ("txt", PHOTO, "not_utf8"),
    "json: nothing": ("json", b"", "not_json"),
    "json: cut": ("json", b'{"caption": "a red', "not_json"),
    "json: latin-1": ("json", '{"caption": "grün"}'.encode("latin-1"), "not_utf8"),
    "json: a lone surrogate": ("json", rb'{"caption": "a \ud800 square"}', "not_utf8"),
    "json: a nul": ("json", rb'{"caption": "a \u0000 square"}', "nul_in_text"),
    "json: nested 100,000 deep": ("json", b'{"a":' * 100_000, "not_json"),
    "json: a number of 5,000 digits": ("json", b'{"caption": "x", "n": ' + b"1" * 5000 + b"}", "not_json"),
    "json: a list": ("json", b'["a red square"]', "no_text"),
    "json: null": ("json", b"null", "no_text"),
    "json: no caption": ("json", b'{"url": "x"}', "no_text"),
    "json: caption is null": ("json", b'{"caption": null}', "no_text"),
    "json: caption is a number": ("json", b'{"caption": 7}', "no_text"),
    "json: caption is a list": ("json", b'{"caption": ["a red square"]}', "no_text"),
    "json: caption is an object": ("json", b'{"caption": {"en": "a red square"}}', "no_text"),
    "json: caption is blank": ("json", b'{"caption": "  "}', "no_text"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
@pytest.mark.parametrize("objective", ["pairs", "texts"])
def test_a_bad_text_is_replaced_and_named(
    name: str, objective: str, tmp_path: Path, prepares: dict[str, Prepare]
) -> None:
    extension, data, reason = BAD_TEXTS[name]
    outcome = one_epoch(tmp_path, pairs_with({"png": picture(3), extension: data}), prepares[objective])
    detail = check_bad(outcome, tmp_path / "odd.tar", reason)
    assert detail
    assert len(detail) < 300


GOOD_TEXTS: dict[str, tuple[str, bytes]] = {
    "a byte order mark": ("txt", b"\xef\xbb\xbfa red square with blue paper under it"),
    "windows line ends": ("txt", b"\r\na red square\r\nwith blue paper under it\r\n"),
    "control characters": ("txt", b"a red\x01 square\x7f with blue paper under\x1b it"),
    "json": ("json", b'{"caption": "a red square with blue paper under it"}'),
    "json with a byte order mark": ("json", b'\xef\xbb\xbf{"caption": "a red square with blue paper under it"}'),
    "json with text instead of a caption": ("json", b'{"text": "a red square with blue paper under it"}'),
    "json with an empty caption and a text": (
        "json",
        b'{"caption": "", "text": "a red square with blue paper under it"}',
    ),
}


@pytest.mark.parametrize("name", GOOD_TEXTS)
def test_an_unusual_text_is_the_same_text(name: str, tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    plain = one_epoch(tmp_path / "a", [("a.txt", b"a red square with blue paper under it")], prepares["texts"])
    extension, data = GOOD_TEXTS[name]
    odd = one_epoch(tmp_path / "b", [(f"a.{extension}", data)], prepares["texts"])
    assert odd.lines == []
    assert plain.batch.text is not None
    assert odd.batch.text is not None
    assert torch.equal(plain.batch.text.input_ids, odd.batch.text.input_ids)
    assert torch.equal(plain.batch.text.labels, odd.batch.text.labels)


def test_a_caption_of_a_megabyte_gives_a_window(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    for objective in ("pairs", "texts"):
        outcome = one_epoch(tmp_path / objective, pairs_with({"png": picture(3), "txt": LONG}), prepares[objective])
        assert outcome.lines == []
        assert "000003" in outcome.keys
        text = outcome.batch.text
        assert text is not None
        at = outcome.keys.index("000003")
        assert text.cu_seqlens.diff()[at] == 32  # max_tokens


# ---- members and keys


def test_keys_and_members_of_every_kind(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    """What becomes of odd names, to the sample; each line says what docs/bad-input.md says."""
    image, text = picture(0), b"a red square"
    members = [
        ("plain.png", image),
        ("upper.PNG", image),  # extensions have no case
        ("far.png", image),  # its text comes at the end
        ("again.png", image),  # twice the same key, neighbours: two samples
        ("again.txt", b"a red square"),
        ("again.png", picture(1)),
        ("again.txt", b"a blue square"),
        ("unknown.xyz", b"?"),  # a sample without a picture
        ("dots.v1.png", image),  # a key ends at the first dot: this member's extension is "v1.png"
        ("dots.v1.txt", text),
        ("README", b"no extension, belongs to no sample"),
        ("plain.txt", text),
        ("upper.Txt", text),
        ("$(touch canary);`touch canary`.png", image),
        ("$(touch canary);`touch canary`.txt", text),
        ("lonely.txt", text),
        ("single.png", image),
        ("plain.png", picture(2)),  # the same key again, far apart, and only half of it
        ("far.txt", text),
    ]
    outcome = one_epoch(tmp_path, members, prepares["pairs"])
    bad = {(line["key"], line["reason"], line["detail"]) for line in outcome.lines}
    assert bad == {
        ("unknown", "no_image", "members xyz"),
        ("dots", "no_image", "members v1.png, v1.txt"),
        ("lonely", "no_image", "members txt"),
        ("single", "no_text", "members png"),
        ("plain", "no_text", "members png"),  # the second one
    }
    assert outcome.batch.notes == {"bad/no_image": 3, "bad/no_text": 2}
    good = {"plain", "upper", "far", "again", "$(touch canary);`touch canary`"}
    assert set(outcome.keys) <= good
    assert len(outcome.keys) == 11
    shards = ShardSet(str(tmp_path / "odd.tar"))
    assert shards.skipped == {"no extension": 1}
    again = [s.members for s in map(shards.read, range(len(shards))) if s.key == "again"]
    assert [m["txt"] for m in again] == [b"a red square", b"a blue square"]
    assert [m["png"] for m in again] == [image, picture(1)]


@pytest.mark.parametrize("key", ["two\nlines", 'quo"te', "not utf-8 \udcff", "x" * 300, "a b/c d/e f", "ü\u202e"])
def test_any_key_can_be_named_in_the_file(key: str, tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    members = [*pairs_with({"png": picture(3), "txt": b"a red square"}), (f"{key}.png", b"no"), (f"{key}.txt", b"x")]
    outcome = one_epoch(tmp_path, members, prepares["pairs"])
    (line,) = outcome.lines
    assert (line["key"], line["reason"]) == (key, "not_an_image")


def test_predictions_name_keys_that_are_not_utf8(tmp_path: Path, tokenizer_path: str) -> None:
    shard = tar(tmp_path / "a.tar", [(f"{i}\udcff😀.txt", caption(i).encode()) for i in range(4)])
    module = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, callbacks=[Predictions()], default_root_dir=str(tmp_path))
    trainer.predict(module, DataModule("none.tar", val=shard, batch_size=4, num_workers=0))
    lines = (tmp_path / "predictions" / "words-0.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"a.tar/{i}\udcff😀" for i in range(4)]


def test_a_txt_counts_even_beside_a_better_json(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    odd = {"png": picture(3), "json": b'{"caption": "a red square"}', "txt": b" "}
    check_bad(one_epoch(tmp_path, pairs_with(odd), prepares["pairs"]), tmp_path / "odd.tar", "no_text")


def test_all_keys_with_dots_are_refused_with_the_extensions_found(tmp_path: Path, tokenizer_path: str) -> None:
    path = tar(tmp_path / "dots.tar", [(f"img.{i}.{x}", b"?") for i in range(3) for x in ("jpg", "txt")])
    with pytest.raises(ShardError, match=r"dots\.tar: has no image and no text \(found: 0\.jpg, 0\.txt, 1\.jpg"):
        _fit(DataModule(path, batch_size=1, num_workers=0), tmp_path, tokenizer_path)


def test_images_alone_where_pairs_are_needed(tmp_path: Path, tokenizer_path: str) -> None:
    whole = tar(tmp_path / "a.tar", pairs_with({}))
    alone = tar(tmp_path / "b.tar", [(f"{i}.png", picture(i)) for i in range(4)])
    with pytest.raises(ShardError, match=r"b\.tar: has no text \(found: png\); MMM needs image and text") as caught:
        _fit(DataModule([whole, alone], batch_size=4, num_workers=0), tmp_path, tokenizer_path)
    assert "\n" not in str(caught.value)


def test_keys_that_dots_make_one_are_told(tmp_path: Path, tokenizer_path: str) -> None:
    """The members of a.v2 belong to sample a, where nobody reads them."""
    members = [*pairs_with({}), ("000000.v2.png", picture(0)), ("000000.v2.txt", b"x"), ("README", b"x")]
    data = DataModule(tar(tmp_path / "a.tar", members), batch_size=4, num_workers=0)
    told = r"not read: 1 x no extension, 1 x \.v2\.png \(a key ends at the first dot of a name\), 1 x \.v2\.txt"
    with pytest.warns(UserWarning, match=told):
        _fit(data, tmp_path, tokenizer_path)


def test_one_bad_json_at_the_beginning_stops_no_run(tmp_path: Path, tokenizer_path: str) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(10)]
    members += [(f"{i}.json", json.dumps({"caption": caption(i)}).encode() if i else b"{}") for i in range(10)]
    _fit(DataModule(tar(tmp_path / "a.tar", members), batch_size=10, num_workers=0), tmp_path, tokenizer_path)
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert {(line["key"], line["reason"]) for line in map(json.loads, lines)} == {("0", "no_text")}


def _fit(data: Any, folder: Path, tokenizer: str) -> None:
    module = mmssl.MMM(tokenizer, "vit_tiny_patch16_224", TINY, max_tokens=32, **DECODER)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(**quiet, enable_checkpointing=False, default_root_dir=str(folder), max_steps=1).fit(module, data)


# ---- shards without samples


NOTHING: dict[str, tuple[bytes, str]] = {
    "0 bytes": (b"", r"odd\.tar: is empty \(0 bytes\)"),
    "only an end mark": (bytes(10240), r"odd\.tar: holds no sample \(found: nothing\)"),
    "half an end mark": (bytes(512), r"odd\.tar: holds no sample"),
    "less than a block": (bytes(100), r"odd\.tar: cut off at byte 100"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_an_empty_shard_is_refused(name: str, tmp_path: Path) -> None:
    data, message = NOTHING[name]
    whole = tar(tmp_path / "whole.tar", pairs_with({}))
    (tmp_path / "odd.tar").write_bytes(data)
    with pytest.raises(ShardError, match=message) as caught:
        ShardSet([whole, str(tmp_path / "odd.tar")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("patterns", [[], [""], "", ["nothing-*.tar"], ["{}.tar"]])
def test_zero_shards_are_refused(patterns: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no shard|not found"):
        ShardSet(patterns)


def test_a_named_pipe_is_refused_and_nothing_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ShardError, match=r"a\.tar: .*not a regular file"):
        ShardSet(str(tmp_path / "a.tar"))


# ---- substitutes and budget


def test_substitutes_are_the_same_in_every_run_and_counted_by_reason(
    tmp_path: Path, prepares: dict[str, Prepare]
) -> None:
    members = pairs_with({"png": b"no", "txt": b"x"})
    members = [(n, b"" if n == "000007.txt" else b"\xff" if n == "000008.txt" else c) for n, c in members]
    first, second = (one_epoch(tmp_path / n, members, prepares["pairs"]) for n in "ab")
    assert first.keys == second.keys
    assert first.batch.notes == second.batch.notes == {"bad/not_an_image": 1, "bad/no_text": 1, "bad/not_utf8": 1}
    assert {(line["key"], line["reason"]) for line in first.lines} == {
        ("000003", "not_an_image"),
        ("000007", "no_text"),
        ("000008", "not_utf8"),
    }
    assert first.batch.text is not None
    assert second.batch.text is not None
    assert torch.equal(first.batch.text.input_ids, second.batch.text.input_ids)


def test_where_nothing_is_good_the_shard_and_its_reason_are_named(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    members = [(f"{i}.{x}", b"<html>" if x == "jpg" else b"text") for i in range(30) for x in ("jpg", "txt")]
    with pytest.raises(TooManyBadSamples, match=r"16 samples in a row .*; worst shards: .*odd\.tar: 16 x not_an_image"):
        one_epoch(tmp_path, members, prepares["pairs"])


def test_over_the_budget_the_run_stops_and_names_the_worst_shard(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    members = [
        (f"{i}.{x}", b"" if x == "txt" and i % 2 else picture(i) if x == "png" else b"a red square")
        for i in range(40)
        for x in ("png", "txt")
    ]
    shards = ShardSet(
        [
            tar(tmp_path / "whole.tar", pairs_with({"png": picture(3), "txt": b"a red square"})),
            tar(tmp_path / "odd.tar", members),
        ]
    )
    listed = str(tmp_path / "bad_samples.jsonl")
    data = TrainStream([Source("a", shards)], prepares["pairs"], seed=0, batch_size=10, lanes=1, bad_samples=listed)
    batches = Loader(data, workers=0, budget=Budget(0.01, listed))
    with pytest.raises(TooManyBadSamples) as caught:
        deque(batches, 0)  # endless, but for the error
    message = str(caught.value)
    assert re.match(
        r"1\d of \d+ samples cannot be used, over the budget of 1\.00% \(of at least 1000\); worst shards: ", message
    )
    assert f"{tmp_path}/odd.tar: 1" in message
    assert "whole.tar" not in message
    assert listed in message
    assert "\n" not in message


def test_in_evaluation_a_substitute_has_no_weight(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    shards = ShardSet(tar(tmp_path / "odd.tar", pairs_with({"png": b"no", "txt": b"x"})))
    listed = tmp_path / "bad_samples.jsonl"
    batch = EvalSet(shards, prepares["pairs"], seed=0, batch_size=10, bad_samples=str(listed)).batch(0)
    assert batch.valid is not None
    assert batch.valid.tolist() == [i != 3 for i in range(10)]
    assert json.loads(listed.read_text())["reason"] == "not_an_image"
