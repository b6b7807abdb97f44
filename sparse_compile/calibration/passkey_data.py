"""Long texts with hidden passkeys, all of which are asked for at the end: the data on which DuoAttention trains gates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo sierra "
    "tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
LENGTHS = 50  # the number of lengths from the shortest to the longest


@dataclass(frozen=True, eq=False)
class Passkeys:
    """Passkey texts: ``passkeys(step)`` returns a text ``[1, N]``, and which of its tokens are asked, bool ``[1, N]``.

    A text is a stretch of ``haystack``. Each passkey of ``size`` words is announced at a random place between 5 % and 95 % of
    it. The questions for all passkeys follow in order, with their answers, and these are the asked tokens. Each text has one of
    fifty lengths from ``shortest`` to ``longest``, at random. The same step of the same ``seed`` gives the same text.

        >>> data = Passkeys.of_tokens(64, longest=192, shortest=96, count=2, size=4)
        >>> tokens, asked = data(0)
        >>> tokens.shape == asked.shape, int(asked.sum())
        (True, 10)

    Raises ``ValueError`` if the shortest text has no room for the passkeys, and if there are no passkeys or no haystack.
    """

    haystack: Tensor  # [tokens]
    words: Sequence[Tensor]
    announcing: Sequence[Tensor]  # the tokens before each passkey in the haystack
    asking: Sequence[Tensor]  # the tokens before each passkey at the end
    opening: Tensor  # the tokens with which every text begins
    size: int
    shortest: int
    longest: int
    seed: int

    def __post_init__(self) -> None:
        if not self.asking or self.size < 1 or not self.haystack.numel():
            raise ValueError(
                "passkeys need count >= 1, size >= 1 and a text to hide them in, "
                f"got {len(self.asking)} of {self.size} words in {self.haystack.numel()} tokens"
            )
        if not self.told < self.shortest <= self.longest:
            raise ValueError(
                f"texts of {self.shortest} to {self.longest} tokens need room for more than the {self.told} tokens of "
                f"{len(self.asking)} passkeys: use longer texts, or fewer or shorter passkeys"
            )

    @property
    def told(self) -> int:
        """The maximum number of tokens that the opening, the announcements, the questions and the answers take."""
        longest_word = max(word.numel() for word in self.words)
        around = sum(a.numel() + b.numel() for a, b in zip(self.announcing, self.asking, strict=True))
        return self.opening.numel() + around + len(self.asking) * 2 * self.size * longest_word

    def fit(self, shortest: int, longest: int) -> Passkeys:
        """A copy for texts of other lengths, with fewer passkeys if these would take more than half of ``longest``."""
        counts = range(len(self.asking), 0, -1)
        fewer = [replace(self, announcing=self.announcing[:count], asking=self.asking[:count]) for count in counts]
        fitting = next((data for data in fewer if 2 * data.told <= longest), fewer[-1])
        return replace(fitting, shortest=max(shortest, min(longest, 2 * fitting.told)), longest=longest)

    @staticmethod
    def of_text(
        tokenizer: Any,
        text: str,
        *,
        longest: int = 32000,
        shortest: int = 1000,
        count: int = 10,
        size: int = 32,
        seed: int = 42,
    ) -> Passkeys:
        """Passkeys of words for a transformers tokenizer. They are hidden in ``text``, which is repeated if it is short."""
        if count > len(ORDINALS):
            raise ValueError(
                f"passkeys are named first to tenth, so there can be at most {len(ORDINALS)}, got {count}: hide fewer"
            )

        def encode(piece: str) -> Tensor:
            return torch.tensor(tokenizer.encode(piece, add_special_tokens=False), dtype=torch.int64)

        return Passkeys(
            encode(text),
            [encode(f" {word}") for word in WORDS],
            [encode(f"\nRemember this, the {name} passkey is:") for name in ORDINALS[:count]],
            [encode(f"\nWhat is the {name} passkey? It is:") for name in ORDINALS[:count]],
            torch.tensor([token for token in (tokenizer.bos_token_id,) if token is not None], dtype=torch.int64),
            *(size, shortest, longest, seed),
        )

    @staticmethod
    def of_tokens(
        vocabulary: int, *, longest: int = 32000, shortest: int = 1000, count: int = 10, size: int = 32, seed: int = 42
    ) -> Passkeys:
        """Passkeys of random tokens for a model without a tokenizer. A marker token announces each passkey and asks for it."""
        if vocabulary < 2 * count + 2:
            raise ValueError(f"{count} passkeys need a vocabulary of {2 * count + 2} tokens, got {vocabulary}: hide fewer")
        rng = torch.Generator().manual_seed(seed)
        marks, rest = torch.randperm(vocabulary, generator=rng).split((count, vocabulary - count))
        haystack = rest[torch.randint(len(rest), (2 * longest,), generator=rng)]
        words, marked = list(rest.unsqueeze(1)), list(marks.unsqueeze(1))
        return Passkeys(haystack, words, marked, marked, haystack[:0], size, shortest, longest, seed)

    @property
    def digest(self) -> str:
        """A hash of everything that the texts are made of. Other texts have another hash."""
        parts = [part.tolist() for part in (self.haystack, self.opening, *self.words, *self.announcing, *self.asking)]
        made = (parts, len(self.asking), self.size, self.shortest, self.longest, self.seed)
        return hashlib.sha256(repr(made).encode()).hexdigest()[:16]

    def length(self, step: int) -> int:
        """Return the number of tokens of the text of a step, without making the text."""
        return self._begin(step)[1]

    def _begin(self, step: int) -> tuple[torch.Generator, int]:
        """Return the random numbers of a step, and its length, which is the first of them."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        at = int(torch.randint(LENGTHS, (1,), generator=rng))
        return rng, self.shortest + (self.longest - self.shortest) * at // (LENGTHS - 1)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the text of a step, int64 ``[1, N]``, and which of its tokens are asked, bool ``[1, N]``."""
        rng, length = self._begin(step)

        def pick(count: int, size: int = 1) -> list[int]:
            return torch.randint(count, (size,), generator=rng).tolist()

        keys = [torch.cat([self.words[at] for at in pick(len(self.words), self.size)]) for _ in self.asking]
        announced = [torch.cat(pair) for pair in zip(self.announcing, keys, strict=True)]
        tail = torch.cat([part for pair in zip(self.asking, keys, strict=True) for part in pair])
        room = length - self.opening.numel() - tail.numel() - sum(part.numel() for part in announced)
        start = pick(max(1, len(self.haystack) - room))[0]
        hay = self.haystack[(start + torch.arange(room)) % len(self.haystack)]
        places = (0.05 + 0.9 * torch.rand(len(announced), generator=rng)).mul(room).long().sort().values
        shuffled = [announced[at] for at in torch.randperm(len(announced), generator=rng).tolist()]
        pieces = hay.tensor_split(places)
        context = [part for pair in zip(pieces[:-1], shuffled, strict=True) for part in pair]
        tokens = torch.cat([self.opening, *context, pieces[-1], tail]).unsqueeze(0)
        return tokens, (torch.arange(length) >= length - tail.numel()).unsqueeze(0)
