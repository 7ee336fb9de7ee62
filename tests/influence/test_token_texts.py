"""Each token's text, with tokenizers of every kind: joined they are the text, in any script."""

import itertools

import pytest
from helpers.workshop import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ekfac_dist.influence import token_texts
from ekfac_dist.influence.token_texts import TokenTexts

GREEK = "Ο ταχύς σκύλος· α\u0301λφα"  # the last accent is a character of its own
CHINESE = "敏捷的棕色狐狸。"
EMOJI = "👍🏽 👩🏿\u200d🚀 👨\u200d👩\u200d👧 🇬🇷🇫🇷 1\ufe0f\u20e3"
OTHERS = "नमस्ते สวัสดี שָׁלוֹם Zażółć\n\ttab"
TEXTS = [GREEK, CHINESE, EMOJI, OTHERS, f"{GREEK} {CHINESE} {EMOJI} {OTHERS}"]


def byte_fallback():
    """As Llama 2's: SentencePiece's spaces, a byte for each that no piece holds."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "t", "α", "τ", "ab", "▁τ", "狐"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "τ")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def straddling():
    """A byte-level vocabulary with a token of the end of 好 and the beginning of 的."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end, begin = tiny_tokenizer(bos=False).tokenize("好的")[2:4]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, end + begin])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(end, begin)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_piece():
    pieces = ["[UNK]", "[CLS]", "[SEP]", "the", "run", "##ning", "fox", ",", "狐"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def runs(texts):
    """(text, how many tokens are read together)."""
    starts = [t for t, text in enumerate(texts) if text or t == 0] + [len(texts)]
    return [(texts[a], b - a) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_joined_are_the_text_and_no_character_is_cut(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = TokenTexts(tokenizer).of(ids)
    assert len(texts) == len(ids)
    assert texts[0] == "<|bos|>"
    assert "".join(texts[1:]) == text
    assert "�" not in "".join(texts)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallbacks_tokens_joined_are_the_text_behind_sentencepieces_space(text):
    tokenizer = byte_fallback()
    texts = TokenTexts(tokenizer).of(tokenizer(text)["input_ids"])
    assert texts[:2] == ["<s>", " "]
    assert "".join(texts[1:]) in (f" {text}", text)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(bos=False), byte_fallback()])
def test_tokens_that_are_read_together_are_one_run(tokenizer):
    ids = tokenizer(EMOJI, add_special_tokens=False)["input_ids"]
    found = [text for text, _ in runs(TokenTexts(tokenizer).of(ids)) if text != " "]
    family, keycap = "👨\u200d👩\u200d👧", "1\ufe0f\u20e3"
    assert [text.strip() for text in found] == [
        *("👍🏽", "👩🏿\u200d🚀", family, "🇬🇷", "🇫🇷", keycap),
    ]


def test_a_run_counts_the_tokens_that_it_is_made_of():
    tokenizer = tiny_tokenizer(bos=False)
    texts = TokenTexts(tokenizer).of(tokenizer("a狐b")["input_ids"])
    assert runs(texts) == [("a", 1), ("狐", 3), ("b", 1)]
    assert texts == ["a", "狐", "", "", "b"]
    fallback = byte_fallback()
    ids = fallback("ab棕狐", add_special_tokens=False)["input_ids"]
    assert runs(TokenTexts(fallback).of(ids)) == [(" ", 1), ("ab", 1), ("棕", 3), ("狐", 1)]


def test_characters_that_share_a_token_are_one_run():
    tokenizer = straddling()
    ids = tokenizer("a好的b")["input_ids"]
    assert len(ids) == 7
    assert runs(TokenTexts(tokenizer).of(ids)) == [("a", 1), ("好的", 5), ("b", 1)]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(bos=False), byte_fallback()])
@pytest.mark.parametrize("cut", [1, 2])
def test_of_a_sequence_that_is_cut_within_a_character_only_that_is_unreadable(tokenizer, cut):
    ids = tokenizer("ab棕的", add_special_tokens=False)["input_ids"][:-cut]
    texts = TokenTexts(tokenizer).of(ids)
    assert "".join(texts).strip() == "ab棕�"
    assert runs(texts)[-1] == ("�", 3 - cut)


def test_what_follows_a_character_that_is_cut_is_read_as_it_is():
    tokenizer = tiny_tokenizer(bos=False)
    ids = tokenizer("的")["input_ids"][:2] + tokenizer("ab")["input_ids"]
    assert "".join(TokenTexts(tokenizer).of(ids)) == "�ab"
    assert runs(TokenTexts(tokenizer).of(ids))[0] == ("�", 2)


def test_a_replacement_character_in_the_text_is_a_character_as_others_are():
    tokenizer = tiny_tokenizer(bos=False)
    ids = tokenizer("a\ufffdb")["input_ids"]
    assert runs(TokenTexts(tokenizer).of(ids)) == [("a", 1), ("\ufffd", 3), ("b", 1)]


def test_words_pieces_are_joined_as_the_tokenizer_decodes_them():
    tokenizer = word_piece()
    ids = tokenizer("the running fox, the 狐")["input_ids"]
    texts = TokenTexts(tokenizer).of(ids)
    assert texts == ["[CLS]", " the", " run", "ning", " fox", ",", " the", " 狐", "[SEP]"]


def test_added_tokens_are_read_as_they_are_written():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_tokens([AddedToken("<｜begin▁of▁é｜>"), AddedToken("café")])
    ids = tokenizer("a<｜begin▁of▁é｜>café")["input_ids"]
    assert TokenTexts(tokenizer).of(ids)[-2:] == ["<｜begin▁of▁é｜>", "café"]


def test_an_id_that_no_token_has_is_unreadable_and_no_ids_are_no_texts():
    tokenizer = tiny_tokenizer()
    assert TokenTexts(tokenizer).of([99_999]) == ["�"]
    assert TokenTexts(tokenizer).of([]) == []


@pytest.mark.parametrize("text", ["🇬🇷", "a\u0301", "\u0301", "\u200d"])
def test_a_long_run_of_tokens_costs_no_more_than_short_ones_for_each(text, monkeypatch):
    looked_at = []

    def counted(end, following):
        looked_at.append(len(end) + len(following))
        return continues(end, following)

    continues = token_texts._continues
    monkeypatch.setattr(token_texts, "_continues", counted)
    tokenizer = tiny_tokenizer(bos=False)
    ids = tokenizer(text)["input_ids"] * 2_000
    assert "".join(TokenTexts(tokenizer).of(ids)) == text * 2_000
    assert len(looked_at) < len(ids)
    assert max(looked_at) <= 64
