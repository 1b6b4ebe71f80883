"""The tokenizer of a GGUF file: byte-level BPE, and the chat format of SmolLM2-Instruct."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_CONTROL = 3  # gguf.TokenType.CONTROL
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Tokenizer:
    """Text to token ids and back.

    Args:
      file: A `Gguf` with the vocabulary and the merges of a byte-level BPE tokenizer whose
        pre-tokenizer is "smollm": single digits, then GPT-2's words.

    Raises:
      ValueError: if the file's tokenizer is another one.
    """

    def __init__(self, file):
        kind = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"the tokenizer must be ('gpt2', 'smollm'), got {kind}")
        words = file.field("tokenizer.ggml.tokens")
        vocabulary = {word: token for token, word in enumerate(words)}
        merges = [tuple(pair.split(" ")) for pair in file.field("tokenizer.ggml.merges")]
        bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        types = file.field("tokenizer.ggml.token_type")
        bpe.add_special_tokens(
            [w for w, kind in zip(words, types, strict=True) if kind == _CONTROL]
        )
        self._bpe = bpe
        self.eos = file.field("tokenizer.ggml.eos_token_id")
        self._start, self._end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]

    def encode(self, text, special=False):
        """Token ids of `text`; `special`: whether names such as "<|im_end|>" are their tokens."""
        self._bpe.encode_special_tokens = not special
        return self._bpe.encode(text).ids

    def encode_chat(self, prompt, system=None):
        """Token ids of one question, up to where the assistant's answer begins.

        The format is the file's `tokenizer.chat_template` for one message, or two with `system`.
        Neither text can end its message: names of special tokens in it are plain text.
        """
        ids = []
        for role, text in (("system", system or _SYSTEM), ("user", prompt)):
            ids += [self._start, *self.encode(f"{role}\n{text}"), self._end, *self.encode("\n")]
        return [*ids, self._start, *self.encode("assistant\n")]

    def decode(self, ids):
        """The text of `ids`, without special tokens."""
        return self._bpe.decode(list(ids))

    def stream(self, ids):
        """Yields the text of each of `ids` as it comes; "" while a character is incomplete."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        for token in ids:
            yield stream.step(self._bpe, token) or ""
