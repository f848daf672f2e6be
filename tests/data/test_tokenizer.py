"""The tokenizer: whole words for every kind of model, special tokens, files from elsewhere, training."""

import multiprocessing
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from webdataset import TarWriter

from mmssl.data.tokenizer import SPECIALS, TextTokenizer, TokenizedText, train_from_shards, train_tokenizer, whole_words

TEXTS = [
    "White Greek small letter omega with tonos on dark blue, bold serif.",
    "The tokenizer doesn't cut whole words (or so it is hoped) - not even well-known ones!",
    "Unbelievable tokenization of uncommon words: hippopotamus, otorhinolaryngologist.",
    "A naïve café, 12,345 times; e.g. snake_case and http://example.org/x?y=1...",
    "   leading and trailing space \t\n",
    "",
]
MODELS = ["wordpiece", "bpe", "unigram"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    sizes = {"wordpiece": 150, "bpe": 330, "unigram": 110}  # small, so that words are cut to pieces
    return {model: train_tokenizer(TEXTS, sizes[model], folder / f"{model}.json", model) for model in MODELS}


def words_by_id(tokenizer: TextTokenizer, encoded: TokenizedText) -> list[str]:
    """The text of each group of tokens that share a word id, spaces removed."""
    groups = {}
    for id, word in zip(encoded.ids, encoded.word_ids, strict=True):
        groups.setdefault(int(word), []).append(int(id))
    groups.pop(-1)
    return [re.sub(r"\s", "", tokenizer.decode(groups[word])) for word in sorted(groups)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", TEXTS[:5])
def test_tokens_of_a_whole_word_share_an_id(trained: dict[str, TextTokenizer], model: str, text: str) -> None:
    tokenizer = trained[model]
    encoded = tokenizer.encode(text)
    expected = whole_words(text)
    if model == "wordpiece":
        expected = [word.lower().replace("ï", "i").replace("é", "e") for word in expected]
    assert words_by_id(tokenizer, encoded) == expected
    inner = encoded.word_ids[encoded.word_ids >= 0]
    assert (np.diff(inner) >= 0).all()
    assert len(inner) > len(expected), "the vocabulary is too large to test anything"


def test_whole_words_are_cut_at_space_and_punctuation() -> None:
    assert whole_words("well-known, (x)  don't 1,5 naïve…") == (
        ["well", "-", "known", ",", "(", "x", ")", "don", "'", "t", "1", ",", "5", "naïve", "…"]
    )
    assert whole_words("日本 हिन्दी e\u0301a") == ["日", "本", "हिन्दी", "e\u0301a"]  # vowel signs and accents stay
    assert whole_words("  ") == []


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens(trained: dict[str, TextTokenizer], model: str) -> None:
    tokenizer = trained[model]
    assert [tokenizer.token(i) for i in range(5)] == list(SPECIALS)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    encoded = tokenizer.encode(TEXTS[0])
    assert encoded.ids.dtype == encoded.word_ids.dtype == np.int32
    assert (encoded.ids[0], encoded.ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert (encoded.word_ids[[0, -1]] == -1).all()
    assert (encoded.word_ids[1:-1] >= 0).all()
    assert tokenizer.encode("").ids.tolist() == [2, 3]
    assert tokenizer.encode(" \n").word_ids[[0, -1]].tolist() == [-1, -1]


@pytest.mark.parametrize("model", MODELS)
def test_a_special_token_in_the_text_is_plain_text(trained: dict[str, TextTokenizer], model: str) -> None:
    for tokenizer in (trained[model], pickle.loads(pickle.dumps(trained[model]))):  # noqa: S301
        inner = tokenizer.encode("a [MASK] b [SEP]").ids[1:-1]
        assert not {tokenizer.mask_id, tokenizer.sep_id} & set(inner.tolist())


def test_an_unknown_word_is_no_word(trained: dict[str, TextTokenizer]) -> None:
    encoded = trained["wordpiece"].encode("white ☃ blue")
    unknown = encoded.ids == trained["wordpiece"].unk_id
    assert unknown.sum() == 1
    assert (encoded.word_ids[unknown] == -1).all()
    assert set(encoded.word_ids.tolist()) == {-1, 0, 2}  # the unknown word keeps its number


@pytest.mark.parametrize("model", MODELS)
def test_round_trip(trained: dict[str, TextTokenizer], model: str) -> None:
    tokenizer = trained[model]
    for text in TEXTS[:4]:
        back = tokenizer.decode(tokenizer.encode(text).ids)
        if model == "wordpiece":  # lower-cased, and punctuation stands alone
            assert tokenizer.decode(tokenizer.encode(back).ids) == back
            assert back.replace(" ", "").startswith(text.lower().replace(" ", "")[:3])
        else:
            assert back == text


def _encode_in_child(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids.tolist()


def test_pickles_for_spawned_workers_without_its_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 150, tmp_path / "t.json")
    (tmp_path / "t.json").unlink()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_encode_in_child, (tokenizer, TEXTS[1])) == tokenizer.encode(TEXTS[1]).ids.tolist()


def test_to_json_gives_the_file_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 150, tmp_path / "t.json")
    assert tokenizer.to_json() == (tmp_path / "t.json").read_text(encoding="utf-8")
    assert tokenizer.vocab_size == Tokenizer.from_str(tokenizer.to_json()).get_vocab_size()


def _foreign(names: list[str], **vocab: int) -> Tokenizer:
    """A byte-level tokenizer in RoBERTa's manner."""
    pieces = {**{name: i for i, name in enumerate(names)}}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), "..", "...", "Ġa"]:
        pieces[piece] = len(pieces)
    merges = [(".", "."), ("..", "."), ("Ġ", "a")]
    backend = Tokenizer(models.BPE(pieces, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return backend


def test_a_tokenizer_in_robertas_spelling(tmp_path: Path) -> None:
    backend = _foreign(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(tmp_path / "t.json"))
    tokenizer = TextTokenizer(tmp_path / "t.json")
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    encoded = tokenizer.encode("ab a ... c")
    assert (encoded.ids[0], encoded.ids[-1]) == (0, 2)
    assert tokenizer.decode(encoded.ids) == "ab a ... c"
    # "..." is one token over three words, which joins them; the numbers of the others stay.
    assert [tokenizer.token(i) for i in encoded.ids[1:-1]] == ["a", "b", "Ġa", "Ġ", "...", "Ġ", "c"]
    assert encoded.word_ids.tolist() == [-1, 0, 0, 1, 2, 2, 5, 5, -1]


def test_a_tokenizer_that_does_not_wrap_texts_is_made_to(tmp_path: Path) -> None:
    _foreign(list(SPECIALS)).save(str(tmp_path / "t.json"))
    assert TextTokenizer(tmp_path / "t.json").encode("a").ids[[0, -1]].tolist() == [2, 3]


def test_a_missing_special_token_is_named(tmp_path: Path) -> None:
    _foreign(["<s>", "<pad>", "</s>", "<unk>"]).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"t\.json: has no \[MASK\] token \(nor <mask>\).*mmssl tokenizer train"):
        TextTokenizer(tmp_path / "t.json")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json: cannot be read \(No such file.*mmssl tokenizer train"):
        TextTokenizer(tmp_path / "absent.json")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: not a Hugging Face tokenizer\.json"):
        TextTokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_training_is_repeatable(tmp_path: Path, model: str) -> None:
    """In another process too: the library's hash tables are seeded anew in each."""
    texts = re.findall(r"[^.]+\.", " ".join(sys.modules[m].__doc__ or "" for m in ("re", "pickle", "subprocess")))
    train_tokenizer(texts, 400, tmp_path / "a.json", model)
    (tmp_path / "texts").write_bytes(pickle.dumps(texts))
    code = (
        "import pickle; from mmssl.data.tokenizer import train_tokenizer; "
        f"train_tokenizer(pickle.load(open('texts', 'rb')), 400, 'b.json', {model!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_lowercase_is_a_choice(tmp_path: Path) -> None:
    cased = train_tokenizer(TEXTS, 150, tmp_path / "t.json", lowercase=False)
    assert cased.decode(cased.encode("White").ids) == "White"
    lower = train_tokenizer(TEXTS, 330, tmp_path / "u.json", "bpe", lowercase=True)
    assert lower.decode(lower.encode("White").ids) == "white"


def test_training_refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model 'word' is unknown; choose one of wordpiece, bpe, unigram"):
        train_tokenizer(TEXTS, 150, tmp_path / "t.json", "word")
    with pytest.raises(ValueError, match="vocab_size 100 is too small for bpe: it must be at least 261"):
        train_tokenizer(TEXTS, 100, tmp_path / "t.json", "bpe")
    for model in MODELS:
        with pytest.raises(ValueError, match="there is no text"):
            train_tokenizer(iter(["", " "]), 300, tmp_path / "t.json", model)
    assert not list(tmp_path.iterdir())


def test_training_from_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with TarWriter(str(tmp_path / f"text-{shard:06d}.tar")) as writer:
            for i, text in enumerate(TEXTS[shard::2]):
                writer.write({"__key__": f"{i:09d}", "txt": text, "json": {"source": "here"}})
    train_from_shards(str(tmp_path / "text-{000000..000001}.tar"), str(tmp_path / "t.json"), 150)
    expected = train_tokenizer(TEXTS[0::2] + TEXTS[1::2], 150, tmp_path / "u.json")
    assert expected.to_json() == (tmp_path / "t.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.json exists"):
        train_from_shards(str(tmp_path / "text-*.tar"), str(tmp_path / "t.json"), 150)


def test_training_from_shards_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shard matches"):
        train_from_shards(str(tmp_path / "none-*.tar"), str(tmp_path / "t.json"))
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "cls": 3})
    with pytest.raises(ValueError, match=r"none of the 1 shards holds a text \(first: .*a\.tar, with \.cls\)"):
        train_from_shards(str(tmp_path / "a.tar"), str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="no shards are named"):
        train_from_shards("", str(tmp_path / "t.json"))
