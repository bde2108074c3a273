import json

from mmgem.training.json_text import to_json


def test_what_is_not_a_number_is_null():
    value = {"loss": float("nan"), "figures": [1.5, float("inf"), (-float("inf"), 2)], "name": "NaN"}
    assert json.loads(to_json(value)) == {"loss": None, "figures": [1.5, None, [None, 2]], "name": "NaN"}
