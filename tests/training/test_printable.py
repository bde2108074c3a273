import pytest

from mmgem.training.printable import counted, printable


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a star.png", "a star.png"),
        ("étoile ★ 星 👩‍🚀.png", "étoile ★ 星 👩‍🚀.png"),
        ("\x1b]0;title\x07.png", r"\x1b]0;title\x07.png"),
        ("a\nb\r\u2028c\x85.png", r"a\nb\r\u2028c\x85.png"),
        ("gpj.\u202egnp", r"gpj.\u202egnp"),
        ("caf\udce9.png", r"caf\udce9.png"),
    ],
)
def test_nothing_steers_the_terminal(text, printed):
    assert printable(text) == printed


def test_a_number_of_things_is_singular_for_one_alone():
    assert [counted(number, "row") for number in (0, 1, 2, 6086)] == ["0 rows", "1 row", "2 rows", "6,086 rows"]
    assert counted(1, "query", "queries") == "1 query" and counted(3, "query", "queries") == "3 queries"
