"""``mmssl shards write``: real sources to real shards, and back through the reader."""

import base64
import csv
import io
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image
from written import picture, read, skipped

from mmssl.cli import main
from mmssl.curation.cutting import count_words, cut_text
from mmssl.curation.records import safe_key


def caption(i: int) -> str:
    return f"Ein Bild, {i} times «gefärbt» 図"


def extension(i: int) -> str:
    return "png" if i % 4 == 3 else "jpg"


def encoded(i: int) -> bytes:
    return picture(i, format="PNG" if extension(i) == "png" else "JPEG")


PAIRS = 77  # several chunks of records, so that processes can overtake each other


def pairs_in_folder(folder: Path) -> list[str]:
    for i in range(PAIRS):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        stem = folder / f"class{i % 3}" / f"photo {i}"
        Path(f"{stem}.{extension(i)}").write_bytes(encoded(i))
        if i % 2:
            Path(f"{stem}.txt").write_text(caption(i) + "\n", encoding="utf-8")
        else:
            Path(f"{stem}.json").write_text(json.dumps({"caption": caption(i), "width": 90}))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jpg").write_bytes(b"not looked at")
    return [str(folder)]


def pairs_in_csv(folder: Path) -> list[str]:
    (folder / "images").mkdir(parents=True)
    with open(folder / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "words", "source"])
        for i in range(PAIRS):
            (folder / "images" / f"{i}.img").write_bytes(encoded(i))
            path = f"images/{i}.img" if i % 2 else str(folder.resolve() / "images" / f"{i}.img")
            writer.writerow([path, caption(i), "somebody,\nsomewhere"])
    return [str(folder / "table.csv"), "--image", "file", "--text", "words"]


def pairs_in_jsonl(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(PAIRS):
            begin = "data:image/jpeg;base64," if i % 2 else ""
            row = {"jpg": begin + base64.b64encode(encoded(i)).decode(), "text": caption(i), "id": f"n{i}.x", "n": i}
            file.write(json.dumps(row) + "\n\n")
    return [str(folder / "rows.jsonl"), "--image", "jpg", "--text", "text", "--key", "id"]


def pairs_in_parquet(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    for part, numbers in (("a", range(8)), ("b", range(8, PAIRS))):  # a folder of tables, as data sets are stored
        rows = {
            # The second table as Hugging Face's datasets store images.
            "image": [encoded(i) if part == "a" else {"bytes": encoded(i), "path": "lost.jpg"} for i in numbers],
            "caption": [caption(i) for i in numbers],
            "label": [float(i) for i in numbers],
            "score": [float("nan") if i == 5 else i / 4 for i in numbers],
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / f"part-{part}.parquet")
    return [str(folder), "--image", "image", "--text", "caption", "--label", "label"]


SOURCES = {"folder": pairs_in_folder, "csv": pairs_in_csv, "jsonl": pairs_in_jsonl, "parquet": pairs_in_parquet}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- there and back


@pytest.mark.parametrize("kind", SOURCES)
def test_round_trip(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SOURCES[kind](tmp_path / "source")
    assert main(["shards", "write", *source, "--out", "out", "--samples_per_shard", "30", "--jobs", "2"]) == 0
    said = capsys.readouterr()
    assert "train: 77 samples in 3 shards" in said.out
    assert said.err == ""
    assert sorted(p.name for p in Path("out").iterdir()) == [
        f"train-{n:06d}.tar{end}" for n in range(3) for end in ("", ".idx")
    ]
    found = read("out")
    by_text = {members["txt"].decode(): members for members in found.values()}
    for i in range(PAIRS):
        assert by_text[caption(i)][extension(i)] == encoded(i)
    assert len(by_text) == PAIRS
    if kind == "folder":
        assert "class1/photo 4" in found
        assert json.loads(found["class1/photo 4"]["json"]) == {"caption": caption(4), "width": 90}
    if kind == "csv":
        assert list(found)[:2] == ["000000000", "000000001"]
        assert json.loads(found["000000003"]["json"]) == {"source": "somebody,\nsomewhere"}
    if kind == "jsonl":
        assert list(found)[:2] == ["n0_x", "n1_x"]  # a dot would end the key
        assert json.loads(found["n7_x"]["json"]) == {"n": 7}
    if kind == "parquet":
        assert found["000000009"]["cls"] == b"9"
        assert json.loads(found["000000005"]["json"]) == {"score": None}
    assert main(["shards", "index", "out/*.tar"]) == 0
    assert "3 were up to date, 0 made anew" in capsys.readouterr().out
    assert main(["shards", "check", "out", "--jobs", "1"]) == (0 if kind != "folder" else 1)
    assert ("no_json" in capsys.readouterr().out) == (kind == "folder")  # there, every other picture had a .json
    assert main(["shards", "stats", "out", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["samples"], figures["images"]["width"]["median"], figures["texts"]["count"]) == (77, 90, 77)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_input_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path / "source")
    outs = []
    for number, more in enumerate((["--jobs", "1"], ["--jobs", "3"], ["--jobs", "1", "--shuffle", "2"])):
        options = [*more, "--short_side", "64", "--val_part", "0.3", "--shard_mb", "0.06"]
        assert main(["shards", "write", *source, "--out", f"out{number}", *options]) == 0
        outs.append({path.name: path.read_bytes() for path in Path(f"out{number}").glob("*.tar")})
        time.sleep(1.1 if number == 0 else 0)  # a tar's times have seconds
    assert outs[0] == outs[1]
    assert {"train-000001.tar", "val-000000.tar"} <= set(outs[0])
    assert outs[0] != outs[2]
    assert read("out0") == read("out2")
    assert list(read("out0")) != list(read("out2"))
    assert main(["shards", "write", *source, "--out", "again", "--jobs", "2", "--shuffle", "2", *options[4:]]) == 0
    assert list(read("again")) == list(read("out2"))


def test_the_same_samples_are_held_out_when_data_is_added(tmp_path: Path) -> None:
    lines = [f"document {i}" for i in range(600)]
    for name, some in (("few", lines[:300]), ("many", lines[::-1])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"t": x, "k": x}) + "\n" for x in some))
        options = ["--text", "t", "--key", "k", "--val_part", "0.2", "--jobs", "1"]
        assert main(["shards", "write", f"{name}.jsonl", "--out", name, *options]) == 0
    few, many = set(read("few", "val")), set(read("many", "val"))
    assert few == many & set(lines[:300])
    assert 80 < len(many) < 160
    assert set(read("many")) | many == set(lines)
    assert not set(read("many")) & many


# ---- images


def test_images_are_made_smaller_only_where_they_are_larger(tmp_path: Path, capsys) -> None:
    source = tmp_path / "source"
    source.mkdir()
    originals = {
        "wide": picture(1, (640, 400)),
        "tall": picture(2, (100, 300)),
        "alpha": picture(3, (200, 150), "PNG", "RGBA"),
        "webp": picture(4, (120, 90), "WEBP"),
        "exact": picture(5, (128, 100)),
    }
    for name, data in originals.items():
        (source / f"{name}.jpeg").write_bytes(data)  # whatever the name says: the content decides
    arguments = ["--out", "out", "--short_side", "100", "--quality", "80", "--jobs", "1"]
    assert main(["shards", "write", "source", *arguments]) == 0
    said = capsys.readouterr().out
    assert "2 images were made smaller" in said
    assert "configs/mae.yaml" in said
    found = read("out")
    sizes = {}
    for name, members in found.items():
        [(extension, data)] = members.items()
        with Image.open(io.BytesIO(data)) as image:
            sizes[name] = (image.format, *image.size, extension)
    assert sizes == {
        "wide": ("JPEG", 160, 100, "jpg"),
        "tall": ("JPEG", 100, 300, "jpg"),
        "alpha": ("JPEG", 133, 100, "jpg"),
        "webp": ("WEBP", 120, 90, "webp"),
        "exact": ("JPEG", 128, 100, "jpg"),
    }
    for name in ("tall", "webp", "exact"):
        assert originals[name] in found[name].values()
    # The small picture is the large one, resized: compare with Pillow's own.
    with Image.open(io.BytesIO(originals["wide"])) as image:
        expected = np.asarray(image.convert("RGB").resize((160, 100), Image.Resampling.BICUBIC), np.float32)
    with Image.open(io.BytesIO(found["wide"]["jpg"])) as image:
        assert np.abs(np.asarray(image, np.float32) - expected).mean() < 4


def test_classes_from_folders(tmp_path: Path) -> None:
    for i, name in enumerate(["zebra", "ant", "ant"]):
        (tmp_path / "source" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name / f"{i}.jpg").write_bytes(picture(i))
    assert main(["shards", "write", "source", "--out", "out", "--labels", "folder", "--jobs", "1"]) == 0
    found = {key: (m["cls"], json.loads(m["json"])) for key, m in read("out").items()}
    assert found == {
        "ant/1": (b"0", {"label": "ant"}),
        "ant/2": (b"0", {"label": "ant"}),
        "zebra/0": (b"1", {"label": "zebra"}),
    }


def test_classes_from_folders_named_by_integers(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / "source" / str(i)).mkdir(parents=True)
        (tmp_path / "source" / str(i) / "a.jpg").write_bytes(picture(i))
    assert main(["shards", "write", "source", "--out", "out", "--labels", "folder", "--jobs", "1"]) == 0
    assert {key: m["cls"] for key, m in read("out").items()} == {f"{i}/a": str(i).encode() for i in range(12)}


def test_what_img2dataset_laid_into_a_folder_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "000.jpg").write_bytes(picture(0))
    (folder / "000.txt").write_text("one")
    (folder / "000.json").write_text('{"url": "x"}')
    (folder / "000.cls").write_text("7\n")
    assert main(["shards", "write", "source", "--out", "out", "--jobs", "1"]) == 0
    assert read("out") == {"000": {"jpg": picture(0), "txt": b"one", "json": b'{"url": "x"}', "cls": b"7"}}


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    source = pairs_in_parquet(tmp_path / "source")
    assert main(["shards", "write", *source, "--out", "out", "--samples_per_shard", "30", "--jobs", "1"]) == 0
    found = list(webdataset.WebDataset([f"out/train-{n:06d}.tar" for n in range(3)], shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"{i:09d}" for i in range(PAIRS)]
    for i, sample in enumerate(found):
        assert (sample[extension(i)], sample["txt"].decode()) == (encoded(i), caption(i))
        assert (int(sample["cls"]), "score" in json.loads(sample["json"])) == (i, True)


def test_long_and_foreign_names_and_turned_pictures(tmp_path: Path) -> None:
    folder = tmp_path / ("sehr " * 30) / "ordner"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.open(io.BytesIO(picture(0, (300, 120)))).save(folder / "図 é.jpg", exif=exif)
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(picture(1))
    assert main(["shards", "write", str(tmp_path / ("sehr " * 30)), "--out", "out", "--short_side", "100"]) == 0
    assert set(read("out")) == {"ordner/図 é", "ordner/_"}
    with Image.open(io.BytesIO(read("out")["ordner/図 é"]["jpg"])) as image:
        assert image.size == (100, 250)
        assert image.getexif().get(0x0112) is None


# ---- texts


def test_documents_are_cut(tmp_path: Path, capsys) -> None:
    source = tmp_path / "source" / "deep.folder"
    source.mkdir(parents=True)
    long = " ".join(f"Word{i}{'.' if i % 7 == 6 else ''}" for i in range(100))
    (source / "a.b.txt").write_text(long)
    (source / "short.txt").write_text("  only this \n")
    assert main(["shards", "write", "source", "--out", "out", "--max_words", "20", "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 documents were cut into pieces" in said
    assert "configs/mlm.yaml" in said
    found = read("out")
    assert found.pop("deep_folder/short") == {"txt": b"only this"}
    texts = [members["txt"].decode() for members in found.values()]
    assert list(found) == [f"deep_folder/a_b-{n:04d}" for n in range(len(texts))]
    assert " ".join(texts) == long
    assert all(count_words(text) <= 20 for text in texts)
    assert all(text.endswith(".") for text in texts[:-1])  # sentences of 7 words end in every second half of 20
    assert json.loads(found["deep_folder/a_b-0001"]["json"]) == {"piece": 1, "pieces": len(texts)}


def test_a_document_is_never_cut_within_a_word_and_nothing_is_lost() -> None:
    rng = random.Random(0)
    alphabet = ["a", "bc", "Word", "end.", 'said."', "\n\n", " ", "  ", "\t", "図", "形。", "x-y", "é", "!", "…"]
    for _ in range(500):
        text = "".join(rng.choice(alphabet) + rng.choice(["", " ", " "]) for _ in range(rng.randrange(60)))
        most = rng.randrange(1, 12)
        pieces = cut_text(text, most)
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)
        assert all(1 <= count_words(piece) <= most and piece == piece.strip() for piece in pieces)
        at = 0
        for piece in pieces[:-1]:  # where it is cut there is a blank, or writing without blanks
            at = text.index(piece, at) + len(piece)
            assert text[at].isspace() or text[at] in "図形" or piece[-1] in "図形。!…" or piece[-1] == '"'
    assert cut_text("One two. Three four five. Six", 5) == ["One two. Three four five.", "Six"]
    assert cut_text("a b\n\nc d e", 3) == ["a b", "c d e"]
    assert cut_text("長い文。です", 4) == ["長い文。", "です"]
    assert cut_text("  ", 4) == []


def test_a_document_s_pieces_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"{i}.txt").write_text("word " * 50)
    assert main(["shards", "write", "source", "--out", "out", "--max_words", "10", "--val_part", "0.3"]) == 0
    train, val = ({key[:-5] for key in read("out", part)} for part in ("train", "val"))
    assert not train & val
    assert len(train | val) == 40


def test_a_document_per_line(tmp_path: Path) -> None:
    Path("lines.txt").write_bytes("\ufeffone\n\n \ntwo words\r\n".encode() + b"\xff\xfe bad\nlast".replace(b"\r", b""))
    assert (
        main(["shards", "write", "lines.txt", "--out", "out", "--per_line", "--jobs", "1"]) == 1
    )  # one of five lines was skipped
    assert [members["txt"] for members in read("out").values()] == [b"one", b"two words", b"last"]
    assert [(line["source"], line["reason"]) for line in skipped("out")] == [("lines.txt: line 5", "not_utf8")]


def test_keys_are_safe() -> None:
    assert safe_key("a.b/c.d e") == "a_b/c_d e"
    assert safe_key("../../etc/x") == "_/_/etc/x"
    assert safe_key("__MACOSX/.x") == "_MACOSX/_x"
    assert safe_key("a\nb\udc80c\\d//e") == "a_b_c/d/e"
