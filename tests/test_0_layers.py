"""The layers: a folder imports only from those before it, and foreign worlds have one door each."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

FOLDERS = [
    "",  # what lies in fusestore/ itself
    "format",
    "system",
    "config",
    "nodes",
    "metadata",
    "members",
    "log",
    "write",
    "read",
    "commit",
    "repair",
    "grow",
    "store",
    "files",
    "rescue",
    "watch",
    "serve",
    "bench",
    "cli",
]
"""From the ground up: a folder imports only from those before it."""

DOORS = {
    "lmdb": {"metadata.engine", "metadata.environment", "metadata.view"},
    "pyfuse3": {"serve.operations", "serve.daemon", "serve.fuse_device", "bench.null"},
    "matplotlib": {"bench.plot"},
    "cffi": {"format.erasure", "system.linux", "system.io_uring"},
    "reedsolo": {"format.erasure"},
    "prometheus_client": {"watch.families"},
}
PURE = {"", "format"}
"""What does no I/O."""


def modules() -> dict[str, ast.Module]:
    """All modules of the package by their name below it."""
    found = {}
    for path in [*ROOT.glob("fusestore/**/*.py"), *ROOT.glob("nodes/*.py")]:
        below = path.relative_to(ROOT / "fusestore" if "fusestore" in path.parts else ROOT)
        name = ".".join(below.with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def folder(module: str) -> str:
    """The folder that a module lies in."""
    top = module.partition(".")[0]
    return top if top in FOLDERS else ""


def imports(name: str, tree: ast.Module) -> set[str]:
    """What a module imports: own modules by their name below the package, others as `!NAME`."""
    package = name.split(".")
    if not any(other.startswith(name + ".") for other in MODULES):
        package.pop()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {"!" + alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add("!" + str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
            for alias in node.names:
                whole = ".".join(filter(None, [*base, alias.name]))
                found.add(whole if whole in MODULES else whole.rpartition(".")[0])
    return found - {name}


IMPORTS = {name: imports(name, tree) for name, tree in MODULES.items()}


def test_every_folder_has_its_place_and_says_what_it_is() -> None:
    assert {folder(name) for name in MODULES} == set(FOLDERS)
    top = {path.parent.name for path in ROOT.glob("fusestore/*/__init__.py")}
    assert top == set(FOLDERS) - {""}
    for name in FOLDERS:
        said = ast.get_docstring(MODULES[name])
        assert said, name
        assert len(said.splitlines()[0]) > 10, name


def test_folders_import_only_from_those_before_them() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        if name != "__main__"
        for other in others
        if not other.startswith("!") and FOLDERS.index(folder(other)) > FOLDERS.index(folder(name))
    ]
    assert wrong == []


def test_there_is_no_circle() -> None:
    own = {name: {o for o in others if not o.startswith("!")} for name, others in IMPORTS.items()}
    try:
        TopologicalSorter(own).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_foreign_libraries_have_one_door() -> None:
    wrong = [
        f"{name} imports {library}"
        for name, others in IMPORTS.items()
        for library, doors in DOORS.items()
        if f"!{library}" in others and name not in doors
    ]
    wrong += [
        f"{name} imports click"
        for name, others in IMPORTS.items()
        if "!click" in others and folder(name) != "cli"
    ]
    assert wrong == []


def test_threads_have_one_door() -> None:
    opened = re.compile(r"to_thread\.run_sync|start_thread_soon|ThreadPoolExecutor")
    wrong = [
        str(path.relative_to(ROOT))
        for path in ROOT.glob("fusestore/**/*.py")
        if opened.search(path.read_text())
    ]
    assert wrong == ["fusestore/system/threads.py"]


def test_the_ground_waits_for_nothing() -> None:
    for name, others in IMPORTS.items():
        if folder(name) in PURE:
            assert not others & {"!trio", "!socket", "!subprocess", "!pathlib"}, name


def test_the_contributors_map_has_each_folder_in_the_words_of_its_docstring() -> None:
    text = (ROOT / "HACKING.md").read_text()
    table = text[text.index("| folder | what it is |") :].partition("\n\n")[0]
    rows = []
    for name in FOLDERS[1:]:
        docstring = ast.get_docstring(MODULES[name]) or ""
        first = " ".join(docstring.partition("\n\n")[0].split())
        rows.append(f"| `{name}/` | {first} |")
    assert table.splitlines()[2:] == rows


def test_test_modules_share_only_what_lies_in_support() -> None:
    folder = Path(__file__).parent
    wrong = []
    for path in [*folder.glob("*.py"), *folder.glob("support/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            wrong += [
                f"{path.name} imports {name}"
                for name in names
                if name == "conftest" or name.startswith("test_")
            ]
    assert wrong == []


def test_the_documents_name_files_that_exist() -> None:
    """A file or folder of the project that a document names in backticks."""
    named = re.compile(r"`((?:fusestore|nodes|tests|tools|docs)/[\w./]+)`")
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    found = {
        (document.name, path)
        for document in documents
        for path in named.findall(document.read_text())
    }
    assert len(found) > 20
    assert not [(document, path) for document, path in found if not (ROOT / path).exists()]
