from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from mmgem.training.argument_checks import check_arguments, check_keys, check_type


def function(texts, size: int, rate: float = 0.1, names: Sequence[str] | None = None, anything=None):
    pass


@dataclass
class Arguments:
    size: int
    rate: float = 0.1


class Plain:
    def __init__(self, size: int, rate: float = 0.1):
        pass


def test_what_fits_passes():
    check_arguments({"size": 3, "rate": 1, "names": ["a"], "anything": object()}, function, "it", given=["texts"])
    check_arguments({"size": 3, "rate": 0.5, "names": None}, function, "it", given=["texts"])


@pytest.mark.parametrize("target", [function, Arguments, Plain])
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"size": 3, "raet": 1}, "^it has the unknown key `raet`; expected size, rate.*Did you mean `rate`"),
        ({"size": "abc"}, "^`size` in it is 'abc'; expected int"),
        ({"size": 1.5}, "`size` in it is 1.5; expected int"),
        ({"size": True}, "`size` in it is True; expected int"),
        ({"size": 3, "rate": "1e-3"}, "`rate` in it is '1e-3'; expected float"),
        ({"size": 3, "rate": True}, "`rate` in it is True; expected float"),
        ({"rate": 1}, "^it has no `size`"),
        ([1], r"^it is \[1\]; expected a mapping with keys such as size, rate"),
        (None, "^it is None"),
    ],
)
def test_what_does_not_fit_is_named(target, section, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(section, target, "it", given=["texts"])


def test_given_arguments_are_not_for_the_section():
    with pytest.raises(ValueError, match="unknown key `texts`"):
        check_arguments({"texts": [], "size": 3}, function, "it", given=["texts"])


def test_further_arguments_are_those_of_what_they_are_handed_to():
    def outer(size: int, **arguments):
        pass

    check_arguments({"size": 3, "rate": 1}, outer, "it", rest=Plain)
    for section, message in [
        ({"size": 3, "raet": 1}, "Did you mean `rate`"),
        ({"size": 3, "rate": "x"}, "expected float"),
        ({"size": 3, "arguments": 1}, "unknown key `arguments`"),
        ({"rate": 1}, "no `size`"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_arguments(section, outer, "it", rest=Plain)


def test_long_lists_of_names_are_not_printed_but_the_nearest_is():
    known = [f"option_{number}" for number in range(50)]
    with pytest.raises(ValueError, match=r"^it has the unknown key `optoin_7`\. Did you mean `option_7`\?$"):
        check_keys({"optoin_7": 1}, known, "it")


def test_a_type_is_named_as_one_writes_it():
    with pytest.raises(ValueError, match=r"it is \[1\]; expected list\[str\] \| None\."):
        check_type([1], list[str] | None, "it")
