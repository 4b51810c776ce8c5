"""Prompt cleaning, tokens and embeddings against the reference pipeline's own functions."""

import functools
import io
import logging
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from sentencepiece import sentencepiece_model_pb2

from maxdiffusion.conditioning import text
from maxdiffusion.errors import UserError
from tests.support.parity import relative_error
from tests.support.umt5 import encoder_of

PROMPTS = ["a red circle &amp;amp; a  blue\n square", "", "only words that no vocabulary has: ęøß 東京 🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5-like tokenizer folder: Unigram with byte fallback, </s> at the end."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["▁a", "▁red", "▁circle", "▁blue", "▁square", "&", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] + [(word, -float(n)) for n, word in enumerate(words)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@functools.cache
def reference_encoder():
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=400, d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=4)
    return transformers.UMT5EncoderModel(config).eval()


@pytest.mark.parametrize(
    "prompt",
    [
        *PROMPTS,
        "  doubly &amp;lt;escaped&amp;gt;\t tabs\u00a0and\u3000wide spaces \n",
        "The Mona Lisa doesnâ€™t have eyebrows.",
        "&amp;nbsp; edge &nbsp;",
    ],
)
def test_cleaning_is_the_references(prompt):
    assert text.clean(prompt) == prompt_clean(prompt)


def test_embeddings_are_the_references(folder):
    tokenizer = text.load_tokenizer(folder)
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=reference_encoder(), vae=None, scheduler=None, transformer=None
    )
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512, device="cpu").numpy()
    encoder = encoder_of(reference_encoder())
    ours = text.encode_prompts(encoder, tokenizer, PROMPTS)
    assert ours.shape == (3, 512, 24) and ours.dtype == jnp.float32
    assert relative_error(ours, theirs) < 1e-5
    np.testing.assert_array_equal(np.asarray(ours) == 0, theirs == 0)


def test_the_bucket_changes_nothing(folder, monkeypatch):
    tokenizer, encoder = text.load_tokenizer(folder), encoder_of(reference_encoder())
    short = text.encode_prompts(encoder, tokenizer, PROMPTS, max_length=200)
    monkeypatch.setattr(text, "BUCKET", 200)
    whole = text.encode_prompts(encoder, tokenizer, PROMPTS, max_length=200)
    assert relative_error(short, whole) < 1e-6


def test_bytes_survive(folder):
    tokenizer = text.load_tokenizer(folder)
    token_ids, valid = text.tokenize(tokenizer, ["東"])
    names = tokenizer.convert_ids_to_tokens(token_ids[0][valid[0]])
    assert [name for name in names if name.startswith("<0x")] == ["<0xE6>", "<0x9D>", "<0xB1>"]


def test_widths_are_buckets_up_to_the_maximum(folder):
    tokenizer = text.load_tokenizer(folder)
    assert text.tokenize(tokenizer, ["a"])[0].shape == (1, 64)
    assert text.tokenize(tokenizer, ["a " * 63])[0].shape == (1, 64)
    assert text.tokenize(tokenizer, ["a " * 64, "a"])[0].shape == (2, 128)
    assert text.tokenize(tokenizer, ["a " * 64], max_length=100)[0].shape == (1, 100)


def test_a_prompt_that_is_cut_is_said(folder, caplog):
    tokenizer = text.load_tokenizer(folder)
    with caplog.at_level(logging.WARNING):
        token_ids, valid = text.tokenize(tokenizer, ["a " * 511, "a " * 600])
    assert token_ids.shape == (2, 512) and valid.all() and (token_ids[:, -1] == tokenizer.eos_token_id).all()
    (message,) = [record.getMessage() for record in caplog.records if record.name == text.__name__]
    assert "601 tokens" in message and "last 89" in message


TEXTS = [
    *PROMPTS,
    "a cat 🐱 on the moon",
    "naïve café, crème brûlée",
    "“quoted” — dash… ‘single’",
    "一只猫在草地上奔跑，色调艳丽 龘",
    "Привет мир ёж",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 🇫🇷 ✨ ❤️",
    "full width ＡＢＣ１２３ ﬁ ½ ①",
    "under_score [close-up] (weight:1.2) <tag> a/b\\\\c",
    "0123456789 3.14 1,000",
    "ZALGO t̷e̷x̷t̷",
    "a  lot   of\tspace \n lines",
    "x" * 300,
]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """The folder of a UMT5-like spiece.model alone (unigram, byte fallback, pad 0, end 1, unknown 2), and its bytes."""
    model = io.BytesIO()
    lines = [
        "a red circle moving left on a navy background",
        "naïve café",
        "一只猫在草地上奔跑",
        "0123456789 ,.!&",
    ] * 40
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>", "eos_piece": "</s>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=330, model_type="unigram", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **special,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    return folder, model.getvalue()


def converted(content):
    """The same vocabulary as a Unigram model of `tokenizers`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return tokenizer


@pytest.mark.parametrize("prompt", TEXTS)
def test_a_spiece_model_gives_its_own_ids(spiece, prompt):
    folder, content = spiece
    token_ids, valid = text.tokenize(text.load_tokenizer(folder), [prompt])
    ids = token_ids[0][valid[0]].tolist()
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    cleaned = text.clean(prompt)
    assert ids == [*reference.encode(cleaned), 1] and 2 not in ids  # nothing is unknown: all else is bytes
    assert ids == [*converted(content).encode(cleaned).ids, 1]
    assert reference.decode(ids[:-1]) == " ".join(unicodedata.normalize("NFKC", cleaned).split())


def test_a_cut_prompt_of_a_spiece_model_keeps_the_end(spiece):
    token_ids, valid = text.tokenize(text.load_tokenizer(spiece[0]), ["é " * 600])
    assert token_ids.shape == (1, 512) and valid.all() and token_ids[0, -1] == 1


def test_a_damaged_spiece_model_is_an_error(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"sp")
    with pytest.raises(UserError, match=r"No tokenizer can be read from .*spiece.model"):
        text.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_tokenizer_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"No tokenizer can be read from .*spiece.model"):
        text.load_tokenizer(tmp_path)
