"""A whole folder is pushed as one commit; what is in the way is said in one line."""

import json

import fresh_process
import hub_server
import pytest

from mmgem.processing import save_sentence_transformer

PUSH = """
import json, os, shutil, sys
from huggingface_hub import constants
from mmgem.training.cli import app
from typer.testing import CliRunner

folder, answers = sys.argv[1], {}


def push(name):
    result = CliRunner().invoke(app, ["push", folder, "me/tiny"])
    answers[name] = [result.exit_code, result.output]


push("pushed")
os.environ["HF_TOKEN"] = "hf_wrong"
push("wrong token")
del os.environ["HF_TOKEN"]
push("no token")
os.environ["HF_TOKEN"] = "hf_right"
constants.ENDPOINT = "http://127.0.0.1:9"
push("no network")
for name in ("tokenizer.json", "model.safetensors", "boxes.py"):
    os.remove(f"{folder}/{name}")
push("incomplete")
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_folder_is_pushed_or_the_reason_is_said_in_a_line(tiny_model, tiny_processor, tmp_path):
    folder = tmp_path / "my-model"
    save_sentence_transformer(tiny_model, tiny_processor, folder)
    (folder / "README.md").write_text('AutoModel.from_pretrained("my-model")\n')
    (folder / "stages" / "first").mkdir(parents=True)
    (folder / "stages" / "first" / "model.safetensors").write_bytes(b"not for others")
    weights = (folder / "model.safetensors").read_bytes()
    with hub_server.serve() as hub:
        output = fresh_process.run(hub.connect() + PUSH, folder, cwd=tmp_path, installed=True)
        files = hub.repositories["me/tiny"]
    answers = json.loads(output.splitlines()[-1])
    assert answers["pushed"] == [0, f"{hub.url}/me/tiny\n"]
    assert files["README.md"] == b'AutoModel.from_pretrained("me/tiny")\n'
    assert files["model.safetensors"] == weights and "1_NestedVectors/config.json" in files
    assert not any(name.startswith("stages") for name in files)
    for name, message in {
        "wrong token": "mmgem: The Hub refuses the token for 'me/tiny' (401); expected one that may write there.\n",
        "no token": "mmgem: There is no token for the Hub; expected one of `hf auth login`, or in HF_TOKEN.\n",
    }.items():
        assert answers[name] == [1, message]
    status, message = answers["no network"]
    assert status == 1 and message.startswith("mmgem: The Hub cannot be reached: ") and message.count("\n") == 1
    lacks = (
        "which lacks model.safetensors or model.safetensors.index.json, tokenizer.json, boxes.py; expected a whole one"
    )
    assert answers["incomplete"][0] == 1 and lacks in answers["incomplete"][1]
