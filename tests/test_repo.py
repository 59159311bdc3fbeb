"""What holds for the repository as a whole: which file may import what, and what never appears."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hamts

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hamts"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A module imports what stands on a lower line, or what is in its own group. A top-level module that is named on
# no line belongs to the forecaster's.
LAYERS = (
    {"errors", "config"},
    {"ops", "data", "storage", "metrics"},
    {"nn"},
    {"reader", "rollout"},
    {"windows"},
    {"checks"},
    {"training"},
    {"forecaster", "forecast", "routes", "stream", "plot"},
    {"adapters", "report", "cli"},
)
# the parts of these lines know nothing of each other
APART = ({"ops", "data", "storage", "metrics"}, {"adapters", "report"})

# where a library may be imported, as the start of a path inside the package
HOMES = {
    "triton": ("ops/attend_triton", "ops/decode_triton", "ops/layer_triton", "ops/pages_triton"),
    "fla": ("ops/gated_delta_fla.py",),
    "lightning": ("training",),
    "pytorch_lightning": (),
    "narwhals": ("data/",),
    "safetensors": ("storage",),
    "gluonts": ("data/", "metrics.py", "adapters/gluonts"),
    "typer": ("cli",),
    "matplotlib": ("plot", "report"),
    "plotly": ("plot", "report"),
    "holidays": ("data/",),
    "polars": ("data/",),
    "pyarrow": ("data/",),
    "confluent_kafka": ("sources_kafka",),
}
NO_PANDAS = ("config", "errors", "ops/", "nn/", "training", "storage", "metrics")
# they run code that is hidden in data
CODE_IN_DATA = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}

# names under which a distribution is imported, where they differ
IMPORT_NAMES = {"confluent-kafka": "confluent_kafka", "fla-core": "fla", "vega-datasets": "vega_datasets"}


def within(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of the modules that a file imports, wherever in it, but for type checking alone."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((name, node.lineno) for name in _from_names(path, node))
        todo.extend(ast.iter_child_nodes(node))


def _from_names(path: Path, node: ast.ImportFrom) -> list[str]:
    package = ["hamts", *path.relative_to(PACKAGE).parent.parts]
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    # `from hamts import errors` names a module too
    return [f"{module}.{alias.name}" for alias in node.names] if module == "hamts" else [module]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def group(name: str) -> str:
    """First part of a module's name inside the package: `data` of data/frame.py, `storage` of storage_checks.py."""
    first = name.split("/")[0].removesuffix(".py")
    known = [part for layer in LAYERS for part in layer if first == part or first.startswith(part + "_")]
    return max(known, key=len, default="forecaster")


def level(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def arrow_problem(importer: str, imported: str) -> str | None:
    if importer == imported or (importer == "config" and imported == "errors"):
        return None
    upwards = level(imported) > level(importer)
    apart = any({importer, imported} <= parts for parts in APART) or {importer, imported} == {"errors", "config"}
    return f"{importer} must not import {imported}" if upwards or apart else None


def test_imports_go_one_way() -> None:
    problems = []
    for path in SOURCES:
        if within(path) == "__init__.py":
            continue
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] == "hamts" and len(parts) > 1 and not parts[1].startswith("__"):
                problem = arrow_problem(group(within(path)), group(parts[1]))
                if problem:
                    problems.append(f"{within(path)}:{line}: {problem}")
    assert problems == []


def test_the_rule_of_arrows_tells_good_from_bad() -> None:
    for importer, imported in [
        ("ops", "nn"),
        ("data", "nn"),
        ("nn", "training"),
        ("errors", "config"),
        ("ops", "data"),
    ]:
        assert arrow_problem(importer, imported)
    for importer, imported in [("nn", "ops"), ("cli", "forecaster"), ("config", "errors"), ("forecast", "routes")]:
        assert arrow_problem(importer, imported) is None
    assert [group(name) for name in ("storage_checks.py", "data/frame.py", "forecaster", "new.py")] == [
        "storage",
        "data",
        "forecaster",
        "forecaster",
    ]


def test_each_foreign_library_has_one_home() -> None:
    problems = []
    for path in SOURCES:
        for name, line in imports(path):
            library = name.split(".")[0]
            if library in HOMES and not within(path).startswith(HOMES[library] or ("-",)):
                problems.append(f"{within(path)}:{line}: {library} belongs to {HOMES[library]}")
            if library == "pandas" and within(path).startswith(NO_PANDAS):
                problems.append(f"{within(path)}:{line}: no pandas here")
            if library in ("probes", "tests", "benchmarks"):
                problems.append(f"{within(path)}:{line}: hamts must not import {library}")
    assert problems == []


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["gpu"], *extras["viz"], *extras["datasets"], *extras["test"]]
    names = {re.match(r"[A-Za-z0-9-]+", requirement).group() for requirement in declared}
    known = {IMPORT_NAMES.get(name, name) for name in names} | {"hamts"} | sys.stdlib_module_names
    unknown = {
        f"{within(path)}:{line}: {name}"
        for path in SOURCES
        for name, line in imports(path)
        if name.split(".")[0] not in known
    }
    assert unknown == set()


def test_nothing_in_the_package_can_run_code_that_is_hidden_in_data() -> None:
    problems = []
    for path in SOURCES:
        problems += [f"{within(path)}:{line}: {name}" for name, line in imports(path) if name in CODE_IN_DATA]
        for name, call in calls(path):
            keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
            resume = within(path) == "checks.py" and keywords.get("weights_only") == "True"
            if name in ("torch.load", "torch.save") and not (
                resume or name == "torch.save" and within(path) == "checks.py"
            ):
                problems.append(f"{within(path)}:{call.lineno}: {name}")
            if keywords.get("allow_pickle", "False") != "False" or name.endswith(("read_pickle", "to_pickle")):
                problems.append(f"{within(path)}:{call.lineno}: {name} with pickle")
            if name in ("eval", "exec"):
                problems.append(f"{within(path)}:{call.lineno}: {name}")
    assert problems == []


def test_randomness_is_passed_in_and_never_set_for_the_whole_process() -> None:
    forbidden = {"torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed"}
    assert [
        f"{within(path)}:{call.lineno}" for path in SOURCES for name, call in calls(path) if name in forbidden
    ] == []


def test_files_stay_short_enough_to_be_read() -> None:
    too_long = [within(path) for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert too_long == []


def test_no_folder_shadows_a_library_and_no_file_has_tabs() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()
    for folder in ("hamts", "tests", "benchmarks", "probes", "datasets"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".md"):
                assert "\t" not in path.read_text(encoding="utf-8"), path


def test_the_licence_is_apache_2_and_types_are_shipped() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert (PACKAGE / "py.typed").exists()


def test_the_tested_set_lies_within_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(tested[requirement.name.lower()]), text
    assert tested["torch"] == "2.13.0"


# --- the public names


def test_every_public_name_has_a_home_and_type_checkers_see_the_same() -> None:
    assert sorted(hamts._HOME) == sorted(hamts.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == hamts._HOME


@pytest.mark.parametrize("name", hamts.__all__)
def test_every_public_name_can_be_used(name: str) -> None:
    home = PACKAGE.joinpath(*hamts._HOME[name].split(".")[1:])
    if not (home.with_suffix(".py").exists() or home.is_dir()):
        pytest.skip(f"{hamts._HOME[name]} is not there yet")
    assert getattr(hamts, name).__module__.startswith("hamts")
    assert name in dir(hamts)


def test_a_wrong_public_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(AttributeError, match=r"'Fit'.*Available: .*fit"):
        hamts.Fit  # noqa: B018


def test_importing_hamts_loads_no_heavy_library() -> None:
    heavy = ["torch", "pandas", "numpy", "lightning", "gluonts", "narwhals", "typer"]
    code = f"import hamts, hamts.errors, sys, json; print(json.dumps([n for n in {heavy} if n in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(ran.stdout) == []
