"""Mutants are made of bodies of functions alone, and each is noticed by a test that fails, or is named."""

import os

import pytest
import yaml

from benchmarks import mutants
from benchmarks.campaign import fork

FILE = "modeling_mmgem/late_interaction.py"


def test_a_mutant_is_a_function_with_one_change():
    found = list(mutants.mutants_of(FILE))
    assert len({mutant.name for mutant in found}) == len(found) > 20
    changes = {mutant.change for mutant in found if mutant.function == "maxsim"}
    assert {"`scores / query_embeds.shape[1]` -> `scores * query_embeds.shape[1]`", "`0.0` -> `1.0`"} <= changes
    raw = mutants.raw_functions(mutants.import_target(FILE))
    assert {*raw} == {"maxsim", "similarity"} == {mutant.function for mutant in found}


def test_functions_are_found_under_what_decorates_them():
    raw = mutants.raw_functions(mutants.import_target("training/search/checked_files.py"))
    assert {"CheckedWriter.facts", "write_checked", "CheckedFile.read", "_checksum"} <= {*raw}
    raw = mutants.raw_functions(mutants.import_target("modeling_mmgem/joint_step.py"))
    assert "JointStep._joint_loss" in raw


@pytest.mark.slow
def test_a_mutant_is_noticed_or_named(tmp_path):
    wanted = ("`scores / query_embeds.shape[1]` -> `scores * query_embeds.shape[1]`", "`1` -> `2`")

    def run() -> list:
        os.environ["HF_HOME"] = str(tmp_path)  # which the end of pytest removes
        results = mutants.run([FILE], lambda mutant: mutant.function == "maxsim" and mutant.change in wanted)
        return [len(results.noticed), *mutants.report(results, {})]

    _, (noticed, table, wrong) = fork(run)()  # pytest within pytest
    assert noticed == 2 and wrong == []
    assert "| modeling_mmgem/late_interaction.py | 2 | 2 | 0 | 0 | 0 |" in table


def test_the_report_names_what_is_not_explained_and_what_is_explained_in_vain():
    first, second = list(mutants.mutants_of(FILE))[:2]
    results = mutants.Results({}, [], [first, second])
    table, wrong = mutants.report(results, {FILE: {first.name: "why", "maxsim: nothing": "why"}})
    assert "| together | 2 | 0 | 0 | 1 | 1 |" in table
    assert wrong == [
        f"{FILE}:{second.line}: no test notices {second.name}",
        f"{FILE}: explained, but not left: maxsim: nothing",
    ]


def test_what_is_explained_is_a_mutant():
    for file, reasons in yaml.safe_load(mutants.EXPLAINED.read_text(encoding="utf-8")).items():
        assert {*reasons} <= {mutant.name for mutant in mutants.mutants_of(file)}
