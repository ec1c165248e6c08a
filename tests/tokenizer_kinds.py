"""A small tokenizer of every kind that models come with, made here: how each makes text of tokens differs."""

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxserve.config import DEMO_MODEL

SPECIAL = ["<unk>", "<s>", "</s>"]
# Of some characters every tokenizer has tokens, of others those with bytes have but these.
LEARNED = [
    "The quick brown fox jumps over the lazy dog, doesn't it? Ça a été naïve: 12.5 % of them.",
    "def f(x):\n    return x + 1\n\n\n  # two  spaces\tand a tab",
    "Der Fluß fließt. नमस्ते दुनिया। 日本語のテキスト、です。 e\u0301 a\u0308 🙂 👩\u200d👩\u200d👧 \ufffd",
]
_WORDS = sorted({word for text in LEARNED for word in re.findall(r"\w+", text)})
_CHARACTERS = sorted({character for text in LEARNED for character in text if not character.isspace()})


def byte_alphabet() -> Tokenizer:
    """One token for each byte, so that every character but ASCII's falls apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's kind, of Llama 3, Qwen, DeepSeek and most others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=SPECIAL, vocab_size=420))


def llama_2() -> Tokenizer:
    """SentencePiece's BPE with tokens of single bytes, also of Mistral and Phi-3: a text's first space is left out."""
    tokenizer = gemma()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    return tokenizer


def gemma() -> Tokenizer:
    """SentencePiece's BPE with tokens of single bytes; every space counts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL + byte_tokens, vocab_size=420)
    made = json.loads(_trained(tokenizer, trainer).to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] in SPECIAL]
    made["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's unigrams, T5's kind: what it has no token for is lost."""
    characters = {f"{space}{character}": -9.0 for character in _CHARACTERS for space in ("", "▁")}
    words = {f"▁{word}": -4.0 for word in _WORDS}
    pieces = dict.fromkeys(SPECIAL, 0.0) | {"▁": -9.0} | characters | words
    tokenizer = Tokenizer(models.Unigram([*pieces.items()], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: spaces are made between words, and left out before punctuation."""
    characters = [f"{mark}{character}" for character in _CHARACTERS for mark in ("", "##")]
    pieces = dict.fromkeys([*SPECIAL, *characters, *_WORDS])
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (byte_alphabet, byte_level, llama_2, gemma, unigram, word_piece, demo)
}


def _trained(tokenizer: Tokenizer, trainer: object) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator(LEARNED * 3, trainer)
    return tokenizer
