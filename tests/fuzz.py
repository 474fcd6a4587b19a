"""Damaged copies of good files, from a seed."""

import random
import time
from collections.abc import Iterator, Sequence


def damaged(data: bytes, others: Sequence[bytes], tokens: Sequence[bytes], dice: random.Random) -> bytes:
    """A copy with one to four faults: bytes flipped, cut, repeated, moved, replaced by a token or by another file's."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(len(made) + 1)
        end = min(len(made), start + int(dice.expovariate(1 / 8)) + 1)
        match dice.randrange(7):
            case 0 if start < len(made):
                made[start] ^= 1 << dice.randrange(8)
            case 1:
                del made[start:end]
            case 2:
                made[start:start] = made[start:end] * dice.choice((1, 2, 50))
            case 3:
                made[start:end] = dice.choice(tokens)
            case 4:
                made[start:start] = dice.choice(tokens)
            case 5:
                other = dice.choice(others)
                cut = dice.randrange(len(other) + 1)
                made[start:end] = other[cut : cut + dice.randrange(40)]
            case _:
                del made[start:]
    return bytes(made)


def rounds(number: int | None = None, seconds: float | None = None, seed: int = 0) -> Iterator[random.Random]:
    """Dice for so many rounds, or for as long as there is time; the round is the seed."""
    end = None if seconds is None else time.monotonic() + seconds
    count = seed
    while (number is None or count < seed + number) and (end is None or time.monotonic() < end):
        yield random.Random(count)
        count += 1
