"""A small byte-level BPE tokenizer, for models that are trained from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_TOKEN = "<|endoftext|>"
IMAGE_TOKEN = "<image>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing byte-level BPE tokenizer. Any text can be encoded; `<|endoftext|>` ends and pads.

    Args:
        texts: The texts to learn the merges from.
        vocab_size: The most tokens, the 256 bytes and the two special tokens among them.
        model_max_length: The most tokens of a text, which is cut to them.

    Returns:
        The tokenizer, padding on the left, with `<image>` among its tokens.

    Raises:
        ValueError: If `vocab_size` leaves no room for the bytes, or `model_max_length` none for a text.
    """
    if model_max_length < 1:
        raise ValueError(f"`model_max_length` is {model_max_length}; expected 1 or more.")
    if not 258 <= vocab_size < 1 << 31:
        raise ValueError(
            f"`vocab_size` is {vocab_size}; expected at least 258, for 256 bytes and two special tokens, and below "
            "2^31."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN],
        model_max_length=model_max_length,
        padding_side="left",
    )
