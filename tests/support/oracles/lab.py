"""A slow solver for the lab's tasks, which reads the context token by token to answer a question."""

from bench.lab.data import words

ANSWER = 4


def answer(context: list[int], question: list[int]) -> list[int]:
    """Return the tokens that should follow ``question``."""
    match question[0]:
        case words.ASK:
            return told(context)[question[1]]
        case words.EACH:
            return [token for key in question[1:] for token in (key, *told(context)[key])]
        case words.COPY:
            begin = context.index(words.COPY) + 1
            end = begin
            while end < len(context) and context[end] in words.SYMBOLS:
                end += 1
            return context[begin:end]
        case words.COUNT:
            return [words.DIGITS[context.count(words.TALLY)]]
        case words.SUM:
            return sums(question[1:-1])
        case words.CLOSE:
            return question[-2:0:-1]
    raise AssertionError(question)


def told(context: list[int]) -> dict[int, list[int]]:
    """Return the values of every key in the context: four for a needle, one for a pair or a variable."""
    known: dict[int, list[int]] = {}
    for at, token in enumerate(context):
        if token == words.NEEDLE:
            key, *values = context[at + 1 : at + 2 + ANSWER]
            assert key in words.KEYS and key not in known and all(value in words.VALUES for value in values)
            known[key] = values
        elif token == words.SET:
            name, source = context[at + 1 : at + 3]
            assert name in words.KEYS and name not in known
            known[name] = [source] if source in words.VALUES else known[source]
        elif token in words.KEYS and token not in known and at + 1 < len(context) and context[at + 1] in words.VALUES:
            known[token] = [context[at + 1]]
    return known


def sums(digits: list[int]) -> list[int]:
    """Return the running sums of digit tokens, as tokens."""
    total, seen = 0, []
    for digit in digits:
        total = (total + words.DIGITS.index(digit)) % len(words.DIGITS)
        seen.append(words.DIGITS[total])
    return seen


def begin(context: list[int], question: list[int]) -> int:
    """Return where the part of the context that answers the first question begins.

    For a variable this is the start of its chain, and for a pair the start of the block of pairs.
    """
    if question[0] == words.COPY:
        return context.index(words.COPY)
    if words.NEEDLE not in context and words.SET not in context:
        return next(at for at, token in enumerate(context) if token in words.KEYS)
    at = context.index(question[1])
    while context[at - 1] == words.SET and context[at + 1] in words.KEYS:
        at = context.index(context[at + 1])
    return at - 1
