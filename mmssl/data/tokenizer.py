"""Text to token ids and whole words: a thin wrapper over Hugging Face ``tokenizers``.

What a *whole word* is, for every kind of tokenizer alike (whole-word and span hiding build on it):

1. A text is cut at whitespace.  Within a piece every punctuation character (ASCII punctuation or Unicode
   category P) and every CJK ideograph is a word of its own; what is left between them is a word.  This is
   BERT's own rule (Devlin et al. 2019, ``BasicTokenizer``), applied to the characters of the *original* text.
2. A token belongs to the word in which it starts (a leading space belongs to the word after it).
3. A token that reaches into several words joins them to one.  The tokenizers trained here have no such tokens; a
   foreign SentencePiece or BPE tokenizer may, such as RoBERTa's "...".

Axes: L  tokens of one text, special tokens included.
"""

import functools
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from mmssl.data.members import missing, sample_text
from mmssl.data.shards import ShardSet
from mmssl.types import BadSample

# Loader workers encode one text at a time, so threads can only hurt; without this the library also warns at each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Model = Literal["wordpiece", "bpe", "unigram"]
_ALIASES = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"  # BertNormalizer's blocks


class TokenizedText(NamedTuple):
    """One text as tokens: ``ids`` int32 [L] and ``word_ids`` int32 [L].

    Tokens of one whole word share a word id; word ids ascend in reading order.  Special tokens, [UNK] among them, have
    -1: there is nothing to learn from predicting them.  So an unknown word leaves a gap in the count.
    """

    ids: NDArray[np.int32]
    word_ids: NDArray[np.int32]


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    # No category P exists above plane 1, so the scan stops there (about 15 ms, once a process).
    marks = {c for c in map(chr, range(0x80, 0x20000)) if unicodedata.category(c).startswith("P")}
    single = re.escape("".join(sorted(marks | set(string.punctuation)))) + _CJK
    return re.compile(rf"[{single}]|[^\s{single}]+")


def whole_words(text: str) -> list[str]:
    """The whole words of a text in reading order, by rule 1: element i has word id i (if no token joins words)."""
    return _word_pattern().findall(text)


class TextTokenizer:
    """A ``tokenizer.json`` with five special tokens, made for masked prediction.

    The file may come from ``mmssl tokenizer train``, or be any Hugging Face fast tokenizer whose special tokens are
    named [PAD] [UNK] [CLS] [SEP] [MASK] or <pad> <unk> <s> </s> <mask>.  Truncation and padding that the file asks for
    are switched off: texts are packed here.  A file that does not wrap a text in [CLS] ... [SEP] is made to.
    A special token's name *inside* a text is read as plain text, so that data cannot smuggle in a [MASK].

    Pickles by value, so a worker needs no file.

    Args:
        path: the tokenizer.json.

    Raises:
        ValueError: the file is absent, is no tokenizer.json, or lacks a special token.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            serialized = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ValueError(
                f"tokenizer {path}: cannot be read ({reason}). Train one with `mmssl tokenizer train "
                "'data/*.tar' --out tokenizer.json`, or give the path of a Hugging Face tokenizer.json."
            ) from error
        self._load(serialized, str(path))

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return _from_json, (self.to_json(), self.path)

    def _load(self, serialized: str, path: str) -> None:
        try:
            backend = Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"tokenizer {path}: not a Hugging Face tokenizer.json ({str(error).splitlines()[0]}). "
                "Give the tokenizer.json of a fast tokenizer, not vocab.txt, spiece.model or tokenizer_config.json."
            ) from error
        self.path = path
        self._json = self._wrapped_json = serialized
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            _special(backend, name, path) for name in SPECIALS
        )
        #: The five special tokens' ids, ascending: never hidden, never drawn as a random replacement.
        self.special_ids = tuple(sorted({self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id}))
        backend.no_truncation()
        backend.no_padding()
        if backend.encode("a").ids[:: len(backend.encode("a").ids) - 1 or 1] != [self.cls_id, self.sep_id]:
            backend.post_processor = _wrapping(backend, self.cls_id, self.sep_id)
            self._wrapped_json = backend.to_str(pretty=True)
        backend.encode_special_tokens = True
        self._backend = backend
        #: One more than the largest id, so that it is the size of the embedding table even where ids have gaps.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        #: Every id that has a token and is not special: what a random replacement is drawn from.
        self.ordinary_ids = np.array(sorted(set(backend.get_vocab().values()) - set(self.special_ids)), np.int64)
        self._special = frozenset(self.special_ids)
        _word_pattern()  # built here, not at the first text

    def encode(self, text: str) -> TokenizedText:
        """Tokens of one text with [CLS] first and [SEP] last; see TokenizedText."""
        encoding = self._backend.encode(text)
        ids, spans = encoding.ids, encoding.offsets
        ends = [match.end() for match in _word_pattern().finditer(text)]
        # Plain lists: a caption has 20 tokens, where NumPy's calls cost more than the loop (35 against 45 µs in all).
        word_ids, word, past, special, last = [], 0, False, self._special, len(ends) - 1
        for id, (start, end) in zip(ids, spans, strict=True):
            if id in special or last < 0:
                word_ids.append(-1)
                continue
            while ends[word] <= start and word < last:  # a token with a leading space starts in the word after it
                word += 1
            word_ids.append(word)
            past |= end > ends[word]
        if past:
            word_ids = _join(word_ids, spans, [match.start() for match in _word_pattern().finditer(text)])
        return TokenizedText(np.array(ids, np.int32), np.array(word_ids, np.int32))

    def decode(self, ids: NDArray[np.integer] | list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, id: int | np.integer) -> str:
        """The token of an id as the vocabulary spells it ("##ing", "Ġthe", "▁the"); "" where ids have a gap."""
        return self._backend.id_to_token(int(id)) or ""

    def to_json(self) -> str:
        """The tokenizer.json as it was read: write this beside a run's checkpoints."""
        return self._json

    def wrapping(self) -> "TextTokenizer":
        """The same, of a file that itself wraps a text in [CLS] ... [SEP], for other readers of the file."""
        return self if self._wrapped_json == self._json else _from_json(self._wrapped_json, self.path)

    def __repr__(self) -> str:
        return f"TextTokenizer({self.path!r}, vocab_size={self.vocab_size})"


def beginning(ids: NDArray[np.integer], max_tokens: int) -> NDArray[np.integer]:
    """A text cut to ``max_tokens``: its beginning, and [SEP] stays last."""
    return ids if len(ids) <= max_tokens else np.append(ids[: max_tokens - 1], ids[-1])


def _from_json(serialized: str, path: str) -> TextTokenizer:
    tokenizer = TextTokenizer.__new__(TextTokenizer)
    tokenizer._load(serialized, path)
    return tokenizer


def _special(backend: Tokenizer, name: str, path: str) -> int:
    for spelling in (name, _ALIASES[name]):
        found = backend.token_to_id(spelling)
        if found is not None:
            return found
    raise ValueError(
        f"tokenizer {path}: has no {name} token (nor {_ALIASES[name]}), which masked prediction needs. Add it to "
        "added_tokens of the file, or train a tokenizer with `mmssl tokenizer train`."
    )


def _wrapping(backend: Tokenizer, cls_id: int, sep_id: int) -> processors.TemplateProcessing:
    cls, sep = str(backend.id_to_token(cls_id)), str(backend.id_to_token(sep_id))
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, cls_id), (sep, sep_id)],
    )


def _join(word_ids: list[int], spans: list[tuple[int, int]], starts: list[int]) -> list[int]:
    """Rule 3: words that one token covers become one."""
    joined = list(range(len(starts)))  # word -> the word it is counted with
    for first, (_, end) in zip(word_ids, spans, strict=True):
        word = first + 1
        while first >= 0 and word < len(starts) and starts[word] < end:
            joined[word] = joined[first]
            word += 1
    return [joined[word] if word >= 0 else -1 for word in word_ids]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: str | Path,
    model: str = "wordpiece",
    lowercase: bool | None = None,
) -> TextTokenizer:
    """Train a tokenizer, write it to ``path`` and load it.

    The same texts give the same file (``unigram``: but for rounding, since its trainer sums in no fixed order).

    - ``wordpiece``: BERT's (Devlin et al. 2019), lower-cased and without accents unless ``lowercase=False``.
    - ``bpe``: on bytes like GPT-2's (Radford et al. 2019), so nothing is unknown; punctuation stands alone.
    - ``unigram``: SentencePiece's language model (Kudo 2018) with NFKC and "▁" for a space; punctuation stands alone.

    Args:
        texts: any iterable of texts; read once.
        vocab_size: entries wanted, the five special tokens (ids 0 to 4) included; small data give fewer.
        path: where to write the tokenizer.json.
        model: one of the three above.
        lowercase: None means what the model's paper does: True for wordpiece, False for the others.

    Raises:
        ValueError: an unknown model, a vocabulary too small, or no text.
    """
    if model not in get_args(Model):
        raise ValueError(f"tokenizer model {model!r} is unknown; choose one of {', '.join(get_args(Model))}.")
    least = len(SPECIALS) + (256 if model == "bpe" else 1)  # a byte-level vocabulary starts with every byte
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is too small for {model}: it must be at least {least}.")
    lowercase = model == "wordpiece" if lowercase is None else lowercase
    backend = {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}[model](texts, vocab_size, lowercase)
    backend.post_processor = _wrapping(backend, SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]"))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(backend.to_str(pretty=True), encoding="utf-8")
    os.replace(partial, target)  # a killed run leaves no half file
    return TextTokenizer(target)


def _wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # strips accents too if it lower-cases
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_word_pattern().findall(normalizer.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        characters.update(dict.fromkeys(word, count))
    alphabet = sorted(sorted(characters), key=characters.__getitem__, reverse=True)[:1000]
    # The trainer numbers the "##x" pieces in the order of a randomised hash table, and its ties fall with the numbers:
    # two runs gave two vocabularies.  Naming these pieces beforehand fixes the order.
    inner = sorted({"##" + c for word in words for c in word[1:]} & {"##" + c for c in alphabet})
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        **_common(vocab_size) | {"special_tokens": [*SPECIALS, *inner]},
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
    )
    backend.train_from_iterator(_checked(_repeated(words)), trainer)
    trained = Tokenizer(models.WordPiece(backend.get_vocab(), unk_token="[UNK]"))  # anew: the pieces are not special
    trained.add_special_tokens(list(SPECIALS))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.decoder = decoders.WordPiece(prefix="##")
    return trained


def _bpe(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(_checked(texts), trainers.BpeTrainer(**_common(vocab_size), initial_alphabet=alphabet))
    return backend


def _unigram(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    steps: list[normalizers.Normalizer] = [normalizers.NFKC()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    backend.normalizer = normalizers.Sequence(steps)
    # Metaspace first: the other way round every piece between punctuation would get a "▁", and decode would add spaces.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(_checked(texts), trainers.UnigramTrainer(**_common(vocab_size), unk_token="[UNK]"))
    return backend


def _common(vocab_size: int) -> dict[str, Any]:
    return {"vocab_size": vocab_size, "special_tokens": list(SPECIALS), "show_progress": False}


def _repeated(words: Counter[str], chunk: int = 10_000) -> Iterator[str]:
    for word, count in words.items():
        for done in range(0, count, chunk):
            yield f"{word} " * min(chunk, count - done)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The texts, once it is known that one of them holds something."""
    blank = True
    for text in texts:
        blank = blank and not text.strip()
        yield text
    if blank:
        raise ValueError("there is no text to train a tokenizer on: every text is empty. Give texts or captions.")


def train_from_shards(
    shards: str | list[str] = "",
    out: str = "tokenizer.json",
    vocab_size: int = 30522,
    model: Model = "wordpiece",
    lowercase: bool | None = None,
) -> None:
    """Train on the texts of tar shards: what ``mmssl tokenizer train`` calls.

    Args:
        shards: paths, globs or brace patterns ("data/pairs-{000000..000012}.tar"), one or a list.
        out: the tokenizer.json to write; must not exist.
        vocab_size: entries wanted, the five special tokens included; 30522 is BERT's.
        model: wordpiece, bpe or unigram.
        lowercase: None means True for wordpiece and False for the others.

    Raises:
        ValueError: no shard matches, a shard is damaged, ``out`` exists, or there is no text.
    """
    if not shards:
        raise ValueError("no shards are named; give paths, a glob or a brace pattern of tar files")
    if os.path.exists(out):
        raise ValueError(f"{out} exists and a run may depend on it; remove it, or give another --out")
    data = ShardSet(shards)
    if missing(["text"], data.extensions):
        raise ValueError(
            f"none of the {len(data.shards)} shards holds a text (first: {data.shards[0].path}, with "
            f"{', '.join(f'.{name}' for name in data.extensions)}); give shards with .txt members"
        )
    try:
        tokenizer = train_tokenizer(_texts_of(data), vocab_size, out, model, lowercase)
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); give another --out") from error
    print(f"{out}: {model}, {tokenizer.vocab_size} tokens, from {len(data)} samples in {len(data.shards)} shards")


def _texts_of(data: ShardSet) -> Iterator[str]:
    for i in tqdm(range(len(data)), desc="reading texts", unit=" samples", disable=None):  # None: silent off a terminal
        try:
            yield sample_text(data.read(i))
        except BadSample:
            continue  # the training stream counts and names these; a vocabulary does not miss one
