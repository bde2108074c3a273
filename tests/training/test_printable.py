import pytest

from mmgem.training.printable import printable


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
