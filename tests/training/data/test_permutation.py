"""Orders computed row by row: every number once, every order possible, nothing kept."""

from collections import Counter
from itertools import permutations

import pytest

from mmgem.training.data.permutation import hash_numbers, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_every_number_comes_once(size):
    for key in (0, 1, -5, 2**70):
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_every_order_of_a_few_is_as_likely():
    orders = Counter(tuple(permute(index, 3, key) for index in range(3)) for key in range(1200))
    assert set(orders) == set(permutations(range(3)))
    assert all(140 < count < 260 for count in orders.values())  # 200 expected, standard deviation 13


def test_places_do_not_depend_on_each_other():
    size = 100
    followers = Counter(permute(index + 1, size, 3) - permute(index, size, 3) for index in range(size - 1))
    assert max(followers.values()) < 8
    firsts = Counter(permute(0, 10, key) for key in range(1000))
    assert all(60 < firsts[number] < 140 for number in range(10))


def test_a_billion_rows_take_no_memory_and_no_time():
    size = 10**9 + 7
    places = [permute(index, size, 11) for index in range(size - 500, size)]
    assert len(set(places)) == 500 and all(0 <= place < size for place in places)
    assert sum(place < size // 2 for place in places) in range(200, 300)


def test_hashes_are_the_same_everywhere():
    assert hash_numbers(1, 2) == 7777801250388762567
    assert hash_numbers(2, 1) != hash_numbers(1, 2) != hash_numbers(12)
