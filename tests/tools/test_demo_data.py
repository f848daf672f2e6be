"""The demo data: repeatable, split by character, nothing blank, captions that tell the truth."""

import importlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import webdataset

from mmssl.data.images import decode_image
from mmssl.data.shards import ShardSet
from mmssl.data.tokenizer import TextTokenizer, whole_words
from mmssl.draws import Draws

sys.path.append(str(Path(__file__).parents[2] / "tools"))
tool = importlib.import_module("make_demo_data")
captions = importlib.import_module("demo_data.captions")
glyphs = importlib.import_module("demo_data.glyphs")
prose = importlib.import_module("demo_data.prose")

PAIRS, TEXTS = 900, 150
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "STIXGeneral.ttf")


ALL_FONTS = {Path(path).name: path for path in glyphs.font_files(Path(matplotlib.get_data_path()) / "fonts" / "ttf")}


@pytest.fixture(scope="module", autouse=True)
def fewer_sources() -> Any:
    """Four fonts and every fortieth source file, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        few_fonts = [ALL_FONTS[name] for name in FONTS]
        few_files = prose.source_files()[::40]
        patch.setattr(glyphs, "font_files", lambda folder: few_fonts)
        patch.setattr(prose, "source_files", lambda: few_files)
        yield


def make(out: Path, *more: str) -> int:
    sizes = ["--pairs", str(PAIRS), "--texts", str(TEXTS), "--vocab_size", "1500", "--size", "48", "--val", "0.1"]
    return tool.main(["--out", str(out), *sizes, *more])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    assert make(out, "--workers", "2") == 0
    return out


def read(pattern: Path) -> list[dict[str, Any]]:
    """Samples by webdataset itself."""
    shards = sorted(str(path) for path in pattern.parent.glob(pattern.name))
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


@pytest.fixture(scope="module")
def pairs(demo: Path) -> dict[str, list[dict[str, Any]]]:
    found = {split: read(demo / f"pairs-{split}-*.tar") for split in ("train", "val")}
    for sample in [*found["train"], *found["val"]]:
        sample["about"] = json.loads(sample["json"])
    return found


def test_img2dataset_layout(demo: Path, pairs: dict[str, list[dict[str, Any]]]) -> None:
    assert len(pairs["train"]) + len(pairs["val"]) == PAIRS
    assert 0.05 * PAIRS < len(pairs["val"]) < 0.15 * PAIRS
    labels = json.loads((demo / "labels.json").read_text())["cls"]
    for split in pairs.values():
        assert [sample["__key__"] for sample in split] == [f"{i:09d}" for i in range(len(split))]
        for sample in split:
            assert {"jpg", "txt", "json", "cls"} <= set(sample)
            assert sample["txt"].decode() == sample["about"]["caption"]
            assert labels[int(sample["cls"])] == sample["about"]["script"]
    assert ShardSet(str(demo / "pairs-*.tar")).extensions == dict.fromkeys(("cls", "jpg", "json", "txt"), PAIRS)
    texts = read(demo / "text-train-*.tar")
    assert len(texts) + len(read(demo / "text-val-*.tar")) <= TEXTS
    assert all({"txt", "json"} <= set(sample) for sample in texts)


def test_same_bytes_again_with_other_workers(demo: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "again", "--workers", "1") == 0
    names = sorted(path.name for path in demo.iterdir() if path.suffix in (".tar", ".json"))
    assert "tokenizer.json" in names
    for name in set(names) - {"complete.json"}:  # that one holds seconds
        assert (demo / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_another_seed_gives_other_data(demo: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "other", "--seed", "1") == 0
    name = "pairs-train-000000.tar"
    assert (demo / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_no_character_of_validation_is_trained_on(pairs: dict[str, list[dict[str, Any]]]) -> None:
    train, val = ({sample["about"]["codepoint"] for sample in pairs[split]} for split in ("train", "val"))
    assert not train & val
    part = sum(glyphs.is_validation(codepoint, 0, 0.04) for codepoint in range(20_000)) / 20_000
    assert abs(part - 0.04) < 0.006  # four standard deviations


def test_no_document_of_validation_is_trained_on(demo: Path) -> None:
    sources = [
        {json.loads(sample["json"])["source"] for sample in read(demo / f"text-{split}-*.tar")}
        for split in ("train", "val")
    ]
    assert all(sources)
    assert not sources[0] & sources[1]


def test_pictures_show_ink_on_paper(pairs: dict[str, list[dict[str, Any]]]) -> None:
    for sample in pairs["train"]:
        about = sample["about"]
        pixels = decode_image(sample["jpg"]).float().permute(1, 2, 0).numpy()
        assert pixels.shape == (48, 48, 3)
        ink, paper = (np.array(about[name], np.float32) for name in ("ink_rgb", "paper_rgb"))
        for name, drawn in ((about["ink"], ink), (about["paper"], paper)):
            assert np.abs(drawn - captions.COLOURS[name]).max() <= captions.JITTER
        coverage = (pixels - paper) @ (ink - paper) / ((ink - paper) ** 2).sum()  # 1 on ink, 0 on paper
        assert coverage.max() > 0.4, about
        assert 0.002 < (coverage > 0.4).mean() < 0.9, about  # a large square covers most
        edge = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert np.abs(edge).max() < 0.5, about  # whole within the picture


def test_caption_words_agree_with_the_metadata(pairs: dict[str, list[dict[str, Any]]]) -> None:
    kinds: Counter[str] = Counter()
    for sample in [*pairs["train"], *pairs["val"]]:
        about = sample["about"]
        words = about["words"]
        assert [word for word, _ in words] == whole_words(about["caption"])
        assert about["caption"].startswith(f"{about['ink']} {about['name']} on {about['paper']}")
        easy = [word for word, kind in words if kind == "easy"]
        assert easy == [*about["ink"].split(), *about["paper"].split()]
        if not captions.states_own_style(about["name"]):
            style = about["caption"].rpartition(f" on {about['paper']}")[2].lstrip(",").split()
            assert ("bold" in style) == (about["weight"] == "bold")
            assert ("italic" in style) == (about["slant"] == "italic")
            assert [word for word in style if word in ("serif", "sans", "mono")] == [about["family"]] * bool(
                about["family"]
            )
            assert "Bold" in about["font"] or about["weight"] != "bold"
        cases = {"capital", "small"} & set(about["name"].split())
        if cases and about["case"] and about["script"] in ("latin", "greek", "cyrillic", "armenian"):
            assert about["case"] in cases, about["name"]
        kinds.update(kind for _, kind in words)
    assert set(kinds) == {"easy", "middling", "hard", "other"}
    assert min(kinds.values()) > PAIRS


def test_tokenizer_numbers_words_as_the_metadata_does(demo: Path, pairs: dict[str, list[dict[str, Any]]]) -> None:
    tokenizer = TextTokenizer(demo / "tokenizer.json")
    tokens = 0
    for sample in pairs["val"]:
        encoded = tokenizer.encode(sample["about"]["caption"])
        assert set(encoded.word_ids.tolist()) == {-1, *range(len(sample["about"]["words"]))}
        tokens += len(encoded.ids)
    assert tokens / len(pairs["val"]) < 20


def test_the_caption_of_the_design() -> None:
    style = captions.Style("bold", "upright", "serif")
    caption, words = captions.compose("\N{GREEK SMALL LETTER OMEGA WITH TONOS}", "white", "dark blue", style)
    assert caption == "white greek small letter omega with tonos on dark blue, bold serif"
    by_kind = defaultdict(list)
    for word, kind in words:
        by_kind[kind].append(word)
    assert by_kind == {
        "easy": ["white", "dark", "blue"],
        "middling": ["greek", "small", "bold", "serif"],
        "hard": ["omega", "tonos"],
        "other": ["letter", "with", "on", ","],
    }


def test_names_that_state_a_style_or_look_like_colours() -> None:
    style = captions.Style("regular", "upright", "serif")
    caption, words = captions.compose("\N{MATHEMATICAL BOLD SMALL A}", "red", "white", style)
    assert caption == "red mathematical bold small a on white"
    assert dict(map(tuple, words))["bold"] == "middling"
    _, words = captions.compose("\N{BLACK CHESS KING}", "red", "white", style)
    assert ["black", "hard"] in [list(pair) for pair in words]
    _, words = captions.compose("\N{WHITE SMALL SQUARE}", "red", "black", style)
    assert ["small", "hard"] in [list(pair) for pair in words]  # a size, not a case


@pytest.mark.parametrize("character", ["\x07", "\ue000", "\u3000", "\u200b", "\uffff"])
def test_what_is_not_drawn(character: str) -> None:
    assert captions.name_of(character) is None


def test_a_style_is_said_only_if_it_shows() -> None:
    names = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif.ttf"]
    surveys = {ALL_FONTS[name]: glyphs.survey(ALL_FONTS[name]) for name in names}
    styles = {(chr(g.codepoint), Path(g.font).name): g.style for g in glyphs.with_styles(surveys)}
    assert styles["a", "DejaVuSans-Bold.ttf"] == ("bold", "upright", "sans")
    assert styles["a", "DejaVuSans-Oblique.ttf"] == ("regular", "italic", "sans")
    assert styles["a", "DejaVuSerif.ttf"] == ("regular", "upright", "serif")
    assert styles["☃", "DejaVuSans-Bold.ttf"] == (None, None, "sans")  # one snowman in all three
    assert styles["→", "DejaVuSans-Oblique.ttf"] == ("regular", None, "sans")  # not slanted
    assert captions.Style("regular", "italic", "sans").words() == ["italic", "sans"]
    assert captions.Style("bold", "italic", None).words() == ["bold", "italic"]
    assert captions.Style(None, None, None).words() == []


def test_missing_glyphs_and_blanks_are_left_out() -> None:
    path = ALL_FONTS["DejaVuSans.ttf"]
    found = {codepoint for codepoint, _ in glyphs.survey(path)}
    assert {ord("A"), ord("é"), 0x2603} <= found
    assert not found & {0x20, 0xA0, 0xAD, 0x200B, 0xE000, 0x10FFFF}


def test_colours_can_be_told_apart() -> None:
    values = list(captions.COLOURS.values())
    distances = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 4 * captions.JITTER
    # Ten inks, the other two colours are papers only; the ink is the lighter of the two.
    assert len(captions.PAPERS) == 10
    assert set(captions.PAPERS) | set().union(*captions.PAPERS.values()) == set(captions.COLOURS)
    for ink, papers in captions.PAPERS.items():
        assert papers
        for paper in papers:
            assert captions._luminance(captions.COLOURS[ink]) > captions._luminance(captions.COLOURS[paper])


def test_pieces_of_prose() -> None:
    good = "This sentence explains, in plain English words, what the function is good for and why. "
    code = "Args:\n    x (int): a number\n\n>>> f(1)\n2\n\nname | value\n----- | -----\n\n- a list of things to do\n\n"
    pieces = list(prose.cut(f"{good * 3}\n\n{code}{good * 4}\n\n" * 5))
    assert 1 < len(pieces) < 10
    for piece in pieces:
        assert len(piece.split()) <= prose.MAX_WORDS
        assert piece.replace("\n\n", " ").replace(good.strip(), "").strip() == ""
    assert list(prose.cut("Too short to be of use.")) == []
    assert prose.fingerprint("A  b\nc") == prose.fingerprint("a b c") != prose.fingerprint("a b d")


def test_draws_give_the_same_glyph_other_colours() -> None:
    glyph = glyphs.Glyph(ord("a"), ALL_FONTS["DejaVuSans.ttf"], captions.Style("regular", "upright", "sans"))
    samples = [glyphs.sample(glyph, 48, "png", Draws(0, k)) for k in range(40)]
    assert len({sample["txt"] for sample in samples}) > 15
    assert all(decode_image(sample["png"]).shape == (3, 48, 48) for sample in samples[:3])


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_folder_is_not_overwritten_unasked(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (demo / "complete.json").stat().st_mtime_ns
    assert make(demo) == 2
    assert "exists; add --force" in line_of(capsys)
    assert make(demo, "--if-missing") == 0
    assert "is complete" in capsys.readouterr().out
    assert make(demo, "--if-missing", "--seed", "5") == 2
    assert "made with other settings (seed 0 not 5)" in line_of(capsys)
    assert (demo / "complete.json").stat().st_mtime_ns == before


def test_an_unfinished_folder_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "pairs-train-000000.tar").write_bytes(b"half")
    assert make(out) == 2
    assert "exists and is unfinished; add --force" in line_of(capsys)
    assert make(out, "--if-missing") == 0
    assert json.loads((out / "complete.json").read_text())["counts"]["pairs"]["train"] > 0


def test_files_of_others_are_never_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    assert make(tmp_path, "--force") == 2
    assert "holds files that are not demo data (thesis.tex)" in line_of(capsys)
    assert (tmp_path / "thesis.tex").exists()


def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert make(tmp_path / "file" / "demo") == 2
    assert "cannot be written (Not a directory); give another --out" in line_of(capsys)
    assert make(tmp_path / "demo", "--size", "8") == 2
    assert "--size 8 is too small; give at least 16" in line_of(capsys)
    assert make(tmp_path / "demo", "--val", "0.9") == 2
    assert "--val 0.9 is not between 0 and 0.5" in line_of(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert make(tmp_path / "demo") == 2
    assert "matplotlib is not installed" in line_of(capsys)
