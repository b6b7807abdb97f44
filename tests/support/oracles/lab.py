"""The slow reader of the lab's tasks: what a question's answer is, by looking through the context token by token."""

from bench.lab.data import words

ANSWER = 4


def answer(context: list[int], question: list[int]) -> list[int]:
    """What should follow ``question``."""
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
    """What every key of the context stands for: four values of a needle, one of a pair or a variable."""
    known: dict[int, list[int]] = {}
    for at, token in enumerate(context):
        if token == words.NEEDLE:
            key, *values = context[at + 1 : at + 2 + ANSWER]
            assert key in words.KEYS and key not in known and all(value in words.VALUES for value in values)
            known[key] = values
        elif token == words.SET:
            name, given = context[at + 1 : at + 3]
            assert name in words.KEYS and name not in known
            known[name] = [given] if given in words.VALUES else known[given]
        elif token in words.KEYS and token not in known and at + 1 < len(context) and context[at + 1] in words.VALUES:
            known[token] = [context[at + 1]]
    return known


def sums(digits: list[int]) -> list[int]:
    """The running sums of digit tokens, as tokens."""
    total, seen = 0, []
    for digit in digits:
        total = (total + words.DIGITS.index(digit)) % len(words.DIGITS)
        seen.append(words.DIGITS[total])
    return seen


def begin(context: list[int], question: list[int]) -> int:
    """Where what the first question asks for stands in the context: for a variable its chain, for a pair its block."""
    if question[0] == words.COPY:
        return context.index(words.COPY)
    if words.NEEDLE not in context and words.SET not in context:
        return next(at for at, token in enumerate(context) if token in words.KEYS)
    at = context.index(question[1])
    while context[at - 1] == words.SET and context[at + 1] in words.KEYS:
        at = context.index(context[at + 1])
    return at - 1
