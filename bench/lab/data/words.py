"""The vocabulary: ranges of token ids with names."""

from __future__ import annotations

BYTES = range(256)  # local text, as it lies on disk
NOISE = range(256, 512)  # what a Markov chain writes
KEYS = range(512, 640)  # names of needles, pairs and variables
VALUES = range(640, 768)
DIGITS = range(768, 784)  # 0 to 15
SYMBOLS = range(NOISE.start, VALUES.stop)  # what is copied

START, NEEDLE, ASK, EACH, COPY, SET, TALLY, COUNT, SUM, CLOSE = range(800, 810)
"""START is the first token of everything; NEEDLE, SET and TALLY lie in contexts; the others ask."""

VOCABULARY = 832  # a multiple of 64; ids from 784 to 799 and from 810 on are never used
