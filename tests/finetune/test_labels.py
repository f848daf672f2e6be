"""Where labels come from, and what becomes of wrong ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from labelled import write_labelled
from pairs import TINY
from test_classifiers import SCRATCH, trainer

import mmssl
from mmssl.data.budget import TooManyBadSamples
from mmssl.data.shards import ShardSet
from mmssl.data.tar import ShardError
from mmssl.finetune.labels import Labels
from mmssl.finetune.targets import ManyClasses, Numbers, OneClass, Target
from mmssl.types import BadSample, Sample


def of(
    cls: bytes | None = None, fields: bytes | None = None, key: str | None = None, target: Target | None = None
) -> Any:
    members = {name: data for name, data in {"cls": cls, "json": fields}.items() if data is not None}
    return Labels(target or OneClass(10), key).of(Sample("a", "a.tar", members))


@pytest.mark.parametrize("text", [b"7", b" 7\n", b"+7", b"007"])
def test_cls_is_an_integer_as_text(text: bytes) -> None:
    assert of(text) == 7


@pytest.mark.parametrize("value", [b"7", b'"7"', b'" 7 "'])
def test_json_field(value: bytes) -> None:
    assert of(fields=b'{"digit": ' + value + b', "other": 1}', key="digit") == 7


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda: of(), "no_label"),
        (lambda: of(b""), "no_label"),
        (lambda: of(fields=b"{}"), "no_label"),
        (lambda: of(b"cat"), "label_not_a_number"),
        (lambda: of(b"7.0"), "label_not_a_number"),
        (lambda: of(b"1_0"), "label_not_a_number"),
        (lambda: of("٧".encode()), "label_not_a_number"),
        (lambda: of(b"\xff\xfe7"), "label_not_a_number"),
        (lambda: of(b"9" * 5000), "label_not_a_number"),
        (lambda: of(b"10"), "label_out_of_range"),
        (lambda: of(b"-1"), "label_out_of_range"),
        (lambda: of(b"1", key="digit"), "no_label"),
        (lambda: of(fields=b"{}", key="digit"), "no_label"),
        (lambda: of(fields=b"[7]", key="digit"), "no_label"),
        (lambda: of(fields=b'{"digit": null}', key="digit"), "no_label"),
        (lambda: of(fields=b'{"digit": true}', key="digit"), "label_not_a_number"),
        (lambda: of(fields=b'{"digit": 7.5}', key="digit"), "label_not_a_number"),
        (lambda: of(fields=b'{"digit": [7]}', key="digit"), "label_not_a_number"),
        (lambda: of(fields=b'{"digit": 11}', key="digit"), "label_out_of_range"),
        (lambda: of(fields=b"{", key="digit"), "not_json"),
        (lambda: of(fields=b"\xff", key="digit"), "not_json"),
        (lambda: of(fields=b"[" * 100_000, key="digit"), "not_json"),
    ],
)
def test_wrong_labels_have_a_reason(read: Callable[[], int], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        read()
    assert caught.value.reason == reason


def test_none_of_the_classes() -> None:
    """[] in a .cls, as in a .json; what is empty is not known."""
    assert of(b"[]\n", target=ManyClasses(3)) == of(fields=b'{"k": []}', key="k", target=ManyClasses(3)) == [0, 0, 0]
    for target, reason in ((OneClass(3), "label_not_a_number"), (Numbers(1), "no_label")):
        with pytest.raises(BadSample) as caught:
            of(b"[]", target=target)
        assert caught.value.reason == reason


def test_nothing_is_required_where_labels_are_not() -> None:
    assert Labels(OneClass(10), required=False).of(Sample("a", "a.tar", {})) == -1
    assert Labels(OneClass(10), required=False).of(Sample("a", "a.tar", {"cls": b"3"})) == 3


@pytest.mark.parametrize(
    ("value", "arguments", "message"),
    [
        (12, {}, r"all 16 labels looked at in the \.cls lie outside 0 to 3 \(they go from 12 to 12.*num_classes to 13"),
        (-3, {}, r"they go from -3 to -3, num_classes is 4\); classes begin at 0"),
        ("cat", {}, r"none of 16.*16 x label_not_a_number; the first: 'cat' is no integer;.*label_key.*data\.label"),
        ("3.0", {}, r"the first: '3\.0' is no integer; .*class takes whole numbers from 0"),
        ("1 2", {"target": "regression"}, r"16 x label_of_wrong_length; the first: 2 numbers, not 4;.*num_classes"),
        ("x", {"target": "regression"}, r"the first: \"x\" is no finite number.*regression takes numbers;"),
        (None, {}, r"none of 16 samples.*16 x no_label; the first: no \.cls; members "),
        (1, {"label_key": "shape"}, r"field 'shape' of the \.json \(16 x no_label"),
    ],
)
def test_labels_that_can_never_do_stop_the_start(
    value: object, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shard = write_labelled(tmp_path / "a.tar", 16, dict.fromkeys(range(16), value))
    module = mmssl.ImageClassifier(**SCRATCH, **arguments)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 2).fit(module, mmssl.DataModule(shard, batch_size=4, num_workers=0))


def test_shards_without_any_label_member(pair_shards: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"has no label \(\.cls, or a field of \.json that label_key names\)"):
        trainer(tmp_path, 2).fit(
            mmssl.ImageClassifier(**SCRATCH), mmssl.DataModule(pair_shards, batch_size=4, num_workers=0)
        )


def test_a_few_wrong_labels_are_replaced_and_named(tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", 32, {3: "cat", 8: None, 20: 4})
    module = mmssl.ImageClassifier(**SCRATCH)
    run = trainer(tmp_path, 8)
    run.fit(module, mmssl.DataModule(shard, shard, batch_size=8, num_workers=0))
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    named = {line["key"]: line["reason"] for line in lines}
    assert named == {"000003": "label_not_a_number", "000008": "no_label", "000020": "label_out_of_range"}
    assert module.metrics["accuracy"]._computed is None  # reset: nothing of one validation is left for the next


def test_too_many_wrong_labels_stop_the_run(tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", 64, dict.fromkeys(range(0, 64, 2), 99))
    module = mmssl.ImageClassifier(**{**SCRATCH, "backbone_options": {**TINY, "img_size": 8}})
    with pytest.raises(TooManyBadSamples, match="label_out_of_range") as caught:
        trainer(tmp_path, 30).fit(module, mmssl.DataModule(shard, batch_size=8, num_workers=0))
    bad, read = re.match(r"(\d+) of (\d+) samples cannot be used", str(caught.value)).groups()  # type: ignore[union-attr]
    assert int(read) % 8 == int(bad) % 8  # those that were used come in whole batches
    assert 0.3 < int(bad) / int(read) < 0.7
    assert "Does num_classes fit these labels?" in str(caught.value)


def test_labels_from_a_json_field_train(tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", 16, dict.fromkeys(range(16), "wrong"))
    module = mmssl.ImageClassifier(**SCRATCH, label_key="colour")
    trainer(tmp_path, 2).fit(module, mmssl.DataModule(shard, batch_size=4, num_workers=0))
    labels = [Labels(OneClass(4), "colour").of(ShardSet(shard).read(i)) for i in range(16)]
    assert labels == [i % 4 for i in range(16)]


@pytest.mark.parametrize("text", [b"0 2", b"2,0", b" 2, 0 0\n"])
def test_many_classes(text: bytes) -> None:
    assert of(text, target=ManyClasses(3)) == [1, 0, 1]
    assert of(fields=b'{"tags": [0, 2]}', key="tags", target=ManyClasses(3)) == [1, 0, 1]
    assert of(fields=b'{"tags": []}', key="tags", target=ManyClasses(3)) == [0, 0, 0]  # said, and not merely missing
    assert of(fields=b'{"tags": 1}', key="tags", target=ManyClasses(3)) == [0, 1, 0]


@pytest.mark.parametrize("text", [b"1.5 -2", b"1.5, -2e0"])
def test_numbers(text: bytes) -> None:
    assert of(text, target=Numbers(2)) == [1.5, -2]
    assert of(fields=b'{"box": [1.5, -2]}', key="box", target=Numbers(2)) == [1.5, -2]
    assert of(fields=b'{"size": 7}', key="size", target=Numbers(1)) == [7]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda: of(b" ", target=ManyClasses(3)), "no_label"),
        (lambda: of(b"0 cat", target=ManyClasses(3)), "label_not_a_number"),
        (lambda: of(b"0 3", target=ManyClasses(3)), "label_out_of_range"),
        (lambda: of(fields=b'{"tags": [true]}', key="tags", target=ManyClasses(3)), "label_not_a_number"),
        (lambda: of(fields=b'{"tags": [[0]]}', key="tags", target=ManyClasses(3)), "label_not_a_number"),
        (lambda: of(fields=b'{"tags": {"0": 1}}', key="tags", target=ManyClasses(3)), "label_not_a_number"),
        (lambda: of(b"", target=Numbers(1)), "no_label"),
        (lambda: of(b"1 2", target=Numbers(1)), "label_of_wrong_length"),
        (lambda: of(b"nan", target=Numbers(1)), "label_not_a_number"),
        (lambda: of(b"1e999", target=Numbers(1)), "label_not_a_number"),
        (lambda: of(b"tall", target=Numbers(1)), "label_not_a_number"),
        (lambda: of(fields=b'{"size": true}', key="size", target=Numbers(1)), "label_not_a_number"),
        (lambda: of(fields=b'{"size": [null]}', key="size", target=Numbers(1)), "label_not_a_number"),
        (lambda: of(fields=b'{"size": ' + b"9" * 400 + b"}", key="size", target=Numbers(1)), "label_not_a_number"),
    ],
)
def test_labels_of_other_kinds_that_cannot_be_used(read: Callable[[], Any], reason: str) -> None:
    with pytest.raises(BadSample) as error:
        read()
    assert error.value.reason == reason
