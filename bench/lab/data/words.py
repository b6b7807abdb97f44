"""The vocabulary: named ranges of token ids."""

from __future__ import annotations

BYTES = range(256)  # bytes of text files
NOISE = range(256, 512)  # tokens of a Markov chain
KEYS = range(512, 640)  # names of needles, pairs and variables
VALUES = range(640, 768)
DIGITS = range(768, 784)  # 0 to 15
SYMBOLS = range(NOISE.start, VALUES.stop)  # symbols of the copy task

START, NEEDLE, ASK, EACH, COPY, SET, TALLY, COUNT, SUM, CLOSE = range(800, 810)
"""START begins every sequence. NEEDLE, SET and TALLY occur in contexts, ASK, EACH, COUNT, SUM and CLOSE in questions, and COPY
in both."""

VOCABULARY = 832  # a multiple of 64; ids from 784 to 799 and from 810 on are never used
