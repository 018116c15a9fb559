"""The layers: modules import only downwards, and foreign worlds have one door each."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

LAYERS: list[set[str]] = [
    # 0: pure
    {"__init__", "errors", "limits", "lookups", "erasure", "placement", "records", "acl", "schema",
     "linux", "tally"},
    # 1: storage
    {"toml_files", "config", "mount_options", "mkfs", "nodes", "nodes.base", "nodes.directory",
     "engine", "ring", "journal_room"},
    # 2: the log
    {"members", "log", "journal", "write_path", "read_path", "commit", "replay", "reclaim",
     "snapshot", "pace", "rebuild", "repair", "balance", "rebalance", "topology", "scrub", "report",
     "store"},
    # 3: the file system
    {"quota", "tree", "walk", "contents", "attributes", "quota_roots", "recode", "filesystem",
     "recover", "fsck",
     "fsck_repair", "safety"},
    # 4: faces
    {"operations", "mounts", "control_client", "control", "logs", "status_text", "service_manager",
     "units", "versions", "counts", "web", "monitor"},
    # 5: assembly
    {"daemon", "launch", "cli_mount", "cli_store", "cli_status", "cli_metrics", "cli_rescue",
     "cli_safety", "cli_nodes", "cli_bench", "cli", "cli_policy",
     "cli_errors", "cli_about", "cli_operate", "cli_mount_helper", "man_pages", "__main__",
     "bench", "bench.null", "bench.children", "bench.interrupts", "bench.measured",
     "bench.scale", "bench.watching", "bench.workloads", "bench.surroundings", "bench.targets",
     "bench.store_workloads", "bench.rounds", "bench.report", "bench.plot", "bench.session"},
]  # fmt: skip
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}

DOORS = {
    "lmdb": {"engine"},
    "pyfuse3": {"operations", "daemon", "bench.null"},
    "matplotlib": {"bench.plot"},
    "cffi": {"erasure", "linux", "ring"},
    "reedsolo": {"erasure"},
    "prometheus_client": {"monitor"},
    "click": {"cli", "cli_mount", "cli_store", "cli_status", "cli_metrics", "cli_rescue",
              "cli_safety", "cli_nodes", "cli_errors", "cli_policy",
              "cli_about", "cli_operate", "cli_mount_helper", "cli_bench", "man_pages",
              "status_text"},
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """All modules of the package by their name below it."""
    found = {}
    for folder, prefix in (("fusestore", ""), ("fusestore/bench", "bench."), ("nodes", "nodes.")):
        for path in (ROOT / folder).glob("*.py"):
            name = prefix + path.stem
            name = name.removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module) -> set[str]:
    """What a module imports: own modules by their name below the package, others' top names."""
    folder = "nodes." if name.startswith("nodes") else "bench." if name.startswith("bench") else ""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {"!" + alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add("!" + str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = folder if node.level == 1 else ""
            if node.module is None:
                found |= {base + alias.name for alias in node.names}
            else:
                found.add(base + node.module)
    return {module for module in found if module.startswith("!") or module in LAYER}


def test_every_module_has_its_layer() -> None:
    assert set(modules()) == set(LAYER)


def test_imports_go_downwards() -> None:
    wrong = [
        f"{name} (layer {LAYER[name]}) imports {other} (layer {LAYER[other]})"
        for name, tree in modules().items()
        for other in imports(name, tree)
        if not other.startswith("!") and LAYER[other] > LAYER[name]
    ]
    assert wrong == []


def test_foreign_libraries_have_one_door() -> None:
    wrong = [
        f"{name} imports {library}"
        for name, tree in modules().items()
        for library, doors in DOORS.items()
        if f"!{library}" in imports(name, tree) and name not in doors
    ]
    assert wrong == []


def test_the_lowest_layer_waits_for_nothing() -> None:
    for name, tree in modules().items():
        if LAYER[name] == 0:
            assert not imports(name, tree) & {"!trio", "!socket", "!subprocess", "!pathlib"}, name
