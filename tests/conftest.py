"""Fixtures: a tiny random model, its processor, and inputs; and an environment in which no test meets another."""

import gc
import os
import shutil
import tempfile

import fresh_process
import pytest

# Read when the libraries are imported. Each process of pytest has its own copies of remote code and data sets, no
# network, and one thread.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Thousands of files are written; no test cuts the power, before which they would have to be on the disk.
os.fsync = lambda descriptor: None
# The libraries are imported by the tests, and not here: the process that only gives work to others needs none of them.
gc.disable()  # while they are imported, of which nothing is garbage


def pytest_addoption(parser):
    parser.addoption("--write-pages", action="store_true", help="write docs/compatibility.md again")


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        fresh_process.fork_server()


@pytest.hookimpl(trylast=True)  # of those that are left
def pytest_collection_modifyitems(items):
    """Long files first, so that at the end no worker waits for another. All workers must collect the same names."""
    if addresses := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"names of tests that hold addresses differ between processes: {addresses}")
    slow: dict = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish():
    """What the libraries hold stays; a trainer collects garbage at each of its ends, half a second of it otherwise.

    What the tests leave is little, and looking for it as often as by default is a twentieth of their time.
    """
    gc.freeze()
    gc.set_threshold(5000, 20, 50)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What a file has imported stays, too; and all that training with workers has thawed, or all further trainings of
    this process would look through the libraries for garbage."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"])


@pytest.fixture
def tiny_model():
    from tiny_models import build_model

    return build_model()


@pytest.fixture(scope="session")
def tiny_processor():
    from tiny_models import IMAGE_SIZE, TEXTS
    from transformers import SiglipImageProcessorPil

    from mmgem.processing.processing_mmgem import MMGEMProcessor
    from mmgem.training.recipes.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(TEXTS * 20, vocab_size=300, model_max_length=200)
    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return MMGEMProcessor(image_processor, tokenizer, num_visual_tokens=4)


@pytest.fixture(scope="module")
def short_answers():
    """An untrained model writes until it is cut: here after 16 tokens."""
    from mmgem.training import inference

    generate = inference._generate

    def generate_few(model, inputs, processor, max_new_tokens: int, **memory):
        return generate(model, inputs, processor, min(max_new_tokens, 16), **memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_generate", generate_few)
        yield


@pytest.fixture
def pixel_values():
    import torch
    from tiny_models import IMAGE_SIZE

    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_batch():
    """Three texts of 7, 5 and 3 tokens, padded on the right."""
    import torch

    input_ids = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(2))
    attention_mask = (torch.arange(7) < torch.tensor([[7], [5], [3]])).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}
