"""Fixtures: a folder of pictures, and a place for its index."""

import pytest
from image_folders import write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "index"
