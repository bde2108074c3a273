"""Mutation tests: what is changed in the code of losses, masks, packing, recall and the index, and no test notices.

    python -m benchmarks.mutants

The operators are those of mutmut. Its runner names a function by the path of its file, and finds no test of a package
whose folders have other names than its modules. Here pytest collects once. A mutant is a process forked from there, in
which a function has other code, and which runs the tests that call the function, until one fails or they take too
long, by the time of a processor. Only the bodies of functions are changed, but for the errors that they raise, whose
wording other tests hold.

`mutants.yaml`, beside this file, says of each mutant that no test notices why it makes no difference. The command ends
with 1 if there are others, or if one of those is noticed, or not made any more.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import libcst as cst
import pytest
import yaml
from _pytest.runner import runtestprotocol
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_assignment

from benchmarks.measure import markdown_table

ROOT = Path(__file__).parent.parent
EXPLAINED = Path(__file__).with_suffix(".yaml")
# The files whose code is changed, and the tests that should notice.
LOSS = "tests/modeling_mmgem/test_contrastive.py", "tests/training/trainer/test_contrastive_losses.py"
BATCH = "tests/modeling_mmgem/test_contrastive_batch.py"
PARTS = "tests/training/trainer/test_embedding_views.py", "tests/training/trainer/test_latent_alignment.py"
JOINT = "tests/modeling_mmgem/test_caption_loss.py", "tests/modeling_mmgem/test_joint_step.py"
SEQUENCES = "tests/modeling_mmgem/test_text_sequences.py"
OTHERS = "tests/modeling_mmgem/test_vision_language_model.py", "tests/modeling_mmgem/test_native_aspect_ratio.py"
INDEX = "tests/training/search/test_storage.py", "tests/training/search/test_index.py"
SEARCH = "tests/training/search/test_vector_search.py", "tests/training/search/test_inverted_lists.py"
TARGETS: dict[str, tuple[str, ...]] = {
    "modeling_mmgem/contrastive.py": (*LOSS, PARTS[0]),
    "modeling_mmgem/contrastive_batch.py": (BATCH, *LOSS),
    "modeling_mmgem/joint_step.py": (*JOINT, *OTHERS),
    "modeling_mmgem/late_interaction.py": ("tests/modeling_mmgem/test_late_interaction.py",),
    "modeling_mmgem/packing.py": ("tests/modeling_mmgem/test_packing.py", *JOINT),
    "modeling_mmgem/text_sequences.py": (SEQUENCES, *JOINT),
    "training/evaluation/metrics.py": ("tests/training/evaluation/test_metrics.py",),
    "training/search/checked_files.py": INDEX,
    "training/search/storage.py": INDEX,
    "training/search/vector_codec.py": ("tests/training/search/test_vector_codec.py",),
    "training/search/vector_search.py": SEARCH,
    "training/trainer/contrastive_losses.py": (LOSS[1], *PARTS),
}
SECONDS = 20  # of a processor, that a mutant may take beyond ten times what the tests take without it
IDLE = 5  # times as long may pass before it is ended, which waits for what never comes
_UNCHANGED = (cst.Annotation, cst.Param, cst.Decorator, cst.Raise, cst.Assert)


def changes_of(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yields what mutmut makes of a node, without what differs little from the rest of it: of a string, one change; of
    an argument, None or its absence; of a `device`, none, since tests know one device only."""
    for kind, operator in mutation_operators:
        if not isinstance(node, kind) or operator is operator_assignment:  # None is noticed by whatever runs at all
            continue
        changes = list(operator(node))
        if isinstance(node, cst.BaseString):
            changes = changes[:1]
        if isinstance(node, cst.Call) and operator is operator_arg_removal and len(node.args) > 1:
            keywords = [None if arg.keyword is None else arg.keyword.value for arg in node.args]
            absent = changes[-len(node.args) :]
            nones = [one for one in changes[: -len(node.args)] if isinstance(one, cst.Call)]
            positional = {number for number, keyword in enumerate(keywords) if keyword is None}
            changes = [one for one in nones if _changed(node, one) in positional]
            changes += [one for one, keyword in zip(absent, keywords) if keyword not in (None, "device")]
        yield from changes


def _changed(node: cst.Call, other: cst.Call) -> int:
    return next(number for number, (a, b) in enumerate(zip(node.args, other.args)) if a is not b)


class Mutant(NamedTuple):
    """A change of one function.

    Args:
        file: The file, relative to the repository.
        function: The qualified name of the outermost function.
        change: What is there, and what in its place; numbered where a function has the same several times.
        line: Where it is.
        code: That of the changed function.
    """

    file: str
    function: str
    change: str
    line: int
    code: CodeType

    @property
    def name(self) -> str:
        """What it is called in `mutants.yaml`, in the section of its file."""
        return f"{self.function}: {self.change}"


class _Changes(cst.CSTVisitor):
    """Collects the nodes of the bodies of functions, and what mutmut makes of each."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.scopes: list[tuple[str, bool]] = []
        self.changes: list[tuple[str, CodeRange, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scopes.append((node.name.value, isinstance(node, cst.FunctionDef)))
            return True
        if isinstance(node, _UNCHANGED):
            return False
        functions = [number for number, (_, is_function) in enumerate(self.scopes) if is_function]
        if functions:
            name = ".".join(name for name, _ in self.scopes[: functions[0] + 1])
            place = self.get_metadata(PositionProvider, node)
            self.changes += [(name, place, node, changed) for changed in changes_of(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self.scopes.pop()


def functions_in(code: CodeType) -> dict[str, CodeType]:
    """Returns the code of the functions and methods of a module, but for those within others, by qualified name."""
    found: dict[str, CodeType] = {}
    for part in code.co_consts:
        if isinstance(part, CodeType) and "<" not in part.co_qualname:
            is_class = not part.co_flags & 2  # CO_NEWLOCALS, which the body of a class does not have
            found |= functions_in(part) if is_class else {part.co_qualname: part}
    return found


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yields the mutants of a file that can be compiled, in the order of its lines."""
    source = (ROOT / file).read_text(encoding="utf-8")
    starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
    visitor, seen = _Changes(), Counter[tuple[str, str]]()
    MetadataWrapper(cst.parse_module(source)).visit(visitor)
    for function, place, before, after in visitor.changes:
        old, new = (cst.Module([]).code_for_node(node) for node in (before, after))
        first, last = (starts[position.line - 1] + position.column for position in (place.start, place.end))
        change = f"`{' '.join(old.split())}` -> `{' '.join(new.split())}`"
        seen[function, change] += 1
        if seen[function, change] > 1:
            change += f" ({seen[function, change]})"
        try:
            changed = compile(source[:first] + new + source[last:], str(ROOT / file), "exec", dont_inherit=True)
        except SyntaxError:
            continue
        yield Mutant(file, function, change, place.start.line, functions_in(changed)[function])


def import_target(file: str) -> ModuleType:
    """Imports the module of a file."""
    path = Path(file).with_suffix("")
    package = {"modeling_mmgem": "mmgem", "processing": "mmgem.processing", "training": "mmgem.training"}
    return importlib.import_module(".".join([package[path.parts[0]], *path.parts[1:]]))


def raw_functions(module: ModuleType) -> dict[str, FunctionType]:
    """Returns the functions and methods of a module, without what decorates them, by qualified name."""
    found: dict[str, FunctionType] = {}

    def add(value: Any) -> None:
        for name in ("fget", "func", "__func__", "__wrapped__"):  # of property, cached_property, staticmethod, wraps
            value = getattr(value, name, None) or value
        if isinstance(value, FunctionType) and value.__code__.co_filename == module.__file__:
            found[value.__code__.co_qualname] = value

    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member in list(vars(value).values()):
                add(member)
        else:
            add(value)
    return found


class Results(NamedTuple):
    """What came of mutants.

    Args:
        noticed: By a test that fails, by name of the test.
        late: Ended because the tests took too long.
        left: Noticed by no test.
    """

    noticed: dict[Mutant, str]
    late: list[Mutant]
    left: list[Mutant]


class MutationRun:
    """A plugin of pytest that runs the tests once as they are, and then for each mutant those that reach it.

    Args:
        mutants: What is changed.
    """

    def __init__(self, mutants: Sequence[Mutant]):
        self.mutants, self.results = mutants, Results({}, [], [])
        self.failed: list[str] = []
        self.functions = {file: raw_functions(import_target(file)) for file in {mutant.file for mutant in mutants}}
        self.reached: dict[CodeType, list[int]] = {}
        self.forking: list[int] = []  # tests that may reach anything, in processes of their own
        self.seconds: list[float] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Runs in place of pytest's own loop."""
        wanted = {code.__code__ for functions in self.functions.values() for code in functions.values()}

        def notice(frame: Any, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code in wanted:
                of_code = self.reached.setdefault(frame.f_code, [])
                if not of_code or of_code[-1] != len(self.seconds):
                    of_code.append(len(self.seconds))

        def notice_fork() -> None:
            if self.forking[-1:] != [len(self.seconds)]:
                self.forking.append(len(self.seconds))

        os.register_at_fork(before=notice_fork)
        for item in session.items:
            begin = time.process_time()
            sys.setprofile(notice)
            try:  # without the next one: what tests share is made anew by whichever comes first after a fork
                reports = runtestprotocol(item, log=False, nextitem=None)
            finally:
                sys.setprofile(None)
            self.failed += [item.nodeid for report in reports if report.failed]
            self.seconds.append(time.process_time() - begin)
        if not self.failed:
            for mutant in self.mutants:
                self._try(mutant, session.items)
        return True

    def _try(self, mutant: Mutant, items: Sequence[pytest.Item]) -> None:
        function = self.functions[mutant.file][mutant.function]
        files = TARGETS[mutant.file]
        reaching = {*self.reached.get(function.__code__, []), *self.forking}
        numbers = [n for n in reaching if n < len(items) and _file_of(items[n]) in files]
        numbers.sort(key=lambda n: self.seconds[n])
        seconds = SECONDS + 10 * sum(self.seconds[n] for n in numbers)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its own time, whatever else the machine does
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(IDLE * seconds))
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            try:
                function.__code__ = mutant.code
                for number in numbers:
                    if any(report.failed for report in runtestprotocol(items[number], log=False, nextitem=None)):
                        os.write(writer, items[number].nodeid.encode())
                        break
            except BaseException as error:  # of pytest itself, whose mutant it can hardly be
                os.write(writer, repr(error).encode())
            os._exit(0)
        os.close(writer)
        status = os.waitpid(child, 0)[1]
        with open(reader, "rb") as file:
            test = file.read().decode()
        if test:
            self.results.noticed[mutant] = test
        elif os.WIFSIGNALED(status):
            self.results.late.append(mutant)
        else:
            self.results.left.append(mutant)
            print(f"{mutant.file}:{mutant.line}: {mutant.name}", file=sys.stderr, flush=True)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def run(files: Sequence[str], only: Callable[[Mutant], bool] = lambda mutant: True) -> Results:
    """Runs the tests of files on their mutants.

    Args:
        files: Some of `TARGETS`.
        only: Which mutants.

    Raises:
        RuntimeError: If a test fails without any.
    """
    mutants = [mutant for file in files for mutant in mutants_of(file) if only(mutant)]
    tests = list(dict.fromkeys(test for file in files for test in TARGETS[file]))
    plugin = MutationRun(mutants)
    marks = "not slow and not families and not pages"
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-W", "ignore"]
    pytest.main([*tests, *quiet, "-m", marks, "--rootdir", str(ROOT)], plugins=[plugin])
    if plugin.failed:
        raise RuntimeError(f"{plugin.failed} fail without a mutant; expected no test to.")
    return plugin.results


def report(results: Results, explained: Mapping[str, Mapping[str, str]]) -> tuple[str, list[str]]:
    """A table in Markdown, and what is wrong.

    Args:
        results: Of all mutants of some files.
        explained: For each file, the mutants that make no difference, and why.
    """
    rows, wrong = [], []
    left = {(mutant.file, mutant.name): mutant for mutant in results.left}
    files = [mutant.file for mutant in (*results.noticed, *results.late, *results.left)]
    for file in sorted(set(files)):
        reasons = explained.get(file, {})
        late = sum(mutant.file == file for mutant in results.late)
        noticed = sum(mutant.file == file for mutant in results.noticed)
        mine = [name for of_file, name in left if of_file == file]
        wrong += [f"{file}:{left[file, name].line}: no test notices {name}" for name in mine if name not in reasons]
        wrong += [f"{file}: explained, but not left: {name}" for name in reasons if name not in mine]
        rows.append([file, files.count(file), noticed, late, sum(name in reasons for name in mine)])
        rows[-1].append(len(mine) - rows[-1][-1])
    rows.append(["together", *(sum(row[column] for row in rows) for column in range(1, 6))])
    header = ["file", "mutants", "a test fails", "no end", "no difference", "unexplained"]
    return markdown_table(header, rows), wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Change the code, and see whether a test notices.")
    parser.add_argument("files", nargs="*", default=list(TARGETS), help="some of those that have mutants")
    options = parser.parse_args()
    os.chdir(ROOT)
    results = run(options.files)
    table, wrong = report(results, yaml.safe_load(EXPLAINED.read_text(encoding="utf-8")) or {})
    print("\n".join([table, "", *wrong]))
    sys.exit(bool(wrong))
