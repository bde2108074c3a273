import pytest
import yaml
from huggingface_hub import EvalResultEntry
from huggingface_hub._eval_results import parse_eval_result_entries

from mmgem.training.evaluation.eval_results import check_results_place, write_eval_results
from mmgem.training.hub_push import _files


def test_the_hub_reads_what_was_measured_and_push_takes_it_along(tmp_path):
    write_eval_results(tmp_path, "owner/photos", {"cider": 0.1})
    file = write_eval_results(tmp_path, "owner/photos", {"text_to_image_recall@1": 0.14249, "cider": 0.4})
    assert file == tmp_path / ".eval_results" / "owner--photos.yaml"
    first, second = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert isinstance(first, EvalResultEntry) and first.dataset_id == second.dataset_id == "owner/photos"
    assert (first.task_id, first.value, second.value) == ("text_to_image_recall@1", 0.1425, 0.4)
    assert str(first.date).startswith("20")
    (tmp_path / ".cache").mkdir()
    for name in (".cache/a.yaml", ".eval_results/.hidden", ".gitignore", "README.md"):
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in _files(tmp_path)] == [
        ".eval_results/owner--photos.yaml",
        "README.md",
    ]


@pytest.mark.parametrize("name", ["photos", "a/b/c", "/photos", "owner/", "owner/pho tos", "../photos", "owner/.."])
def test_what_cannot_be_a_dataset_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="`dataset_id` is .*; expected OWNER/NAME"):
        write_eval_results(tmp_path, name, {})
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured():
    with pytest.raises(OSError, match="`folder` is '/proc/.*', which cannot be written"):
        check_results_place("/proc", "owner/photos")


def test_a_model_on_the_hub_has_no_folder_to_keep_results_in(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        write_eval_results(tmp_path / "nowhere", "owner/photos", {})
