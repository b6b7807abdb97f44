"""A tokenizer built without downloads, with whole words as tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_compile.calibration.passkey_data import ORDINALS, WORDS

SAID = "Remember this , the passkey is : What is the passkey ? It is : one two three four five six seven".split()


def word_tokenizer(*, bos: bool = True, letters: bool = False) -> Any:
    """Build the tokenizer. With ``letters`` every letter is a token, so words take more tokens."""
    known = [*"abcdefghijklmnopqrstuvwxyzRWI ,:?\n"] if letters else [*SAID, *WORDS, *ORDINALS]
    names = list(dict.fromkeys(["<s>", "<unk>", *known]))
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    splitter: Any = pre_tokenizers.Split("", "isolated") if letters else pre_tokenizers.Whitespace()
    tokenizer.pre_tokenizer = splitter
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, unk_token="<unk>", **({"bos_token": "<s>"} if bos else {}))
