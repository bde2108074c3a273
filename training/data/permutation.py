"""Random orders that need no memory: the number at a place is computed when it is asked for."""

import hashlib
from functools import lru_cache

_ROUNDS = 6
_SHORTEST_HALF = 3  # bits; with shorter halves some orders of a few numbers would never occur
_MASK = 2**64 - 1


def hash_numbers(*numbers: int) -> int:
    """A 63-bit number that depends on each of the given ones, the same everywhere."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permute(index: int, size: int, key: int) -> int:
    """The number at place `index` of a random order of `range(size)`.

    A Feistel network is a permutation of the numbers of an even count of bits, whatever its round function; walking
    its cycle until a number below `size` comes makes it one of `range(size)` (cycle walking, Black and Rogaway,
    https://doi.org/10.1007/3-540-45760-7_9). Takes some microseconds and no memory for any size.

    Args:
        index: The place, in [0, size).
        size: The count of numbers, 1 or more.
        key: The order; any integer.

    Returns:
        A number in [0, size).
    """
    half = max(_SHORTEST_HALF, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            # The finalizer of splitmix64 (https://doi.org/10.1145/2714064.2660195).
            mixed = right ^ round_key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(hash_numbers(key, number) for number in range(_ROUNDS))
