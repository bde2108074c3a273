"""What the code that travels with a checkpoint may do; see SECURITY.md."""

import ast
import sys

import pytest

from mmgem.processing.hub_code import code_files

LIBRARIES = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
# What runs processes or texts, loads what may hold code, or connects to other machines.
POWERS = {"subprocess", "multiprocessing", "pickle", "marshal", "shelve", "ctypes", "runpy", "pty", "code"}
NETWORK = {"socket", "http", "urllib", "ssl", "ftplib", "smtplib", "asyncio", "socketserver", "xmlrpc"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.fork", "torch.load"}
EXTRA = {
    "url_fetching.py": NETWORK,
    "image_loading.py": {"pillow_heif"},
    "sentence_transformers_mmgem.py": {"sentence_transformers"},
    "sentence_transformers_inputs.py": {"sentence_transformers"},
}


def imports_of(tree: ast.Module) -> set[str]:
    """The top-level packages that a file imports anywhere, but for its siblings."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def calls_of(tree: ast.Module) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("file", code_files(), ids=lambda file: file.name)
def test_code_that_travels_does_what_the_page_says_and_no_more(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    allowed = (set(sys.stdlib_module_names) - POWERS - NETWORK) | LIBRARIES | EXTRA.get(file.name, set())
    assert imports_of(tree) <= allowed
    assert not calls_of(tree) & CALLS


def test_the_reader_of_imports_sees_those_in_functions():
    tree = ast.parse(
        "def f():\n    import subprocess as s\n    from http.client import x\n    eval('1')\n    os.system('')"
    )
    assert imports_of(tree) == {"subprocess", "http"}
    assert calls_of(tree) == {"eval", "os.system"}
