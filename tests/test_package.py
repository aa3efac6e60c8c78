"""What is true of the package as a whole: directions of imports, what an import loads, what a wheel holds."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from flatopt._checks import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flatopt"

# A room is a module or a subpackage directly inside flatopt.  The rooms that each may import from, besides itself:
ALLOWED: dict[str, set[str]] = {
    "_torch": set(),
    "rules": {"_torch"},
    "tasks": set(),
    "flatness": set(),
    "_dataclass_json": set(),
    "_extensions": {"_warn"},
    "_checks": set(),
    "_version": set(),
    "_folder": {"_dataclass_json", "_extensions", "rules"},
    "_cards": {"_folder", "_version", "rules"},
    "hub": set(),
    "pretrained": {"_cards", "_folder", "_warn", "hub", "rules"},
    "_warn": set(),
    "_compile": {"_torch", "_warn", "rules"},
    "_graphs": {"_torch", "_warn"},
    "_dtensor": {"_torch", "rules"},
    "_abstract": {"_torch"},
    "_groups": {"_abstract", "_dtensor"},
    "_watch": {"_groups", "_warn"},
    "_state": {"_abstract", "_dtensor", "_groups", "pretrained", "rules"},
    "_slots": {"_abstract", "_dtensor", "_groups", "_state", "_torch", "rules"},
    "_applied": {"_compile", "_dtensor", "_graphs", "_slots", "_torch", "pretrained", "rules"},
    "_averages": {"_abstract", "_dtensor", "_groups", "_slots", "_state", "_torch", "_warn", "rules"},
    "optimizer": {
        *{"_abstract", "_applied", "_averages", "_groups", "_slots", "_state", "_torch", "_warn", "_watch"},
        "pretrained",
    },
    "metatrain": {
        *{"_cards", "_checks", "_dataclass_json", "_extensions", "_folder", "_graphs", "_torch"},
        *{"_version", "pretrained", "rules", "tasks", "flatness"},
    },
    "evaluate": {
        *{"_checks", "_extensions", "_torch", "_version", "optimizer", "pretrained", "tasks", "flatness"},
    },
    "__init__": {"_version", "optimizer", "pretrained"},
    "__main__": {"_version", "pretrained"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return what a source file imports of flatopt, at its top or later, as dotted names."""
    package = ["flatopt", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == "flatopt"}


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a source file imports from; ``flatopt`` stands for names of the top module."""
    rooms = {(*name.split("."), "")[1] for name in imports(path)}
    return {room if room in ALLOWED else "flatopt" for room in rooms}


def strangers(path: Path) -> list[str]:
    """Return the private names that a file imports although it is not in or below the folder that they belong to."""
    found = []
    for name in imports(path):
        parts = name.split(".")[1:]
        for depth, part in enumerate(parts):
            owner = PACKAGE.joinpath(*parts[:depth])
            owner = owner if owner.is_dir() else owner.parent
            if part.startswith("_") and not part.startswith("__") and owner not in path.parents:
                found.append(name)
    return found


def circles(imported: dict[str, set[str]]) -> set[str]:
    """Return the modules that import themselves, by way of others or not."""
    reached = {name: set(others) for name, others in imported.items()}
    for middle in imported:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return {name for name, others in reached.items() if name in others}


def over_the_bars(path: Path) -> list[str]:
    """Return the functions of more than 60 lines, docstring included, or more than 8 arguments."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min(one.lineno for one in (node, *node.decorator_list))
            end, given = node.end_lineno or first, node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            if end - first + 1 > 60 or len(arguments) > 8:
                found.append(f"{path.stem}.{node.name}")
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert imported_rooms(path) - {room} <= ALLOWED[room]


def test_import_reader_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "rules" / "deep" / "rule.py"
    path.parent.mkdir(parents=True)
    forms = {
        "import flatopt.tasks": {"tasks"},
        "import flatopt.tasks.images as images": {"tasks"},
        "from flatopt import tasks": {"tasks"},
        "from flatopt import FlatOpt": {"flatopt"},
        "from flatopt.metatrain.cli import main": {"metatrain"},
        "from ... import evaluate": {"evaluate"},
        "from ...evaluate import cli": {"evaluate"},
        "from .. import _rule": {"rules"},
        "from ._rule import State": {"rules"},
        "def late():\n    from ...hub import push": {"hub"},
        "import torch": set(),
    }
    for source, rooms in forms.items():
        path.write_text(source)
        assert imported_rooms(path) == rooms, source


def test_files_and_functions_are_short() -> None:
    assert not [path for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    over = {name for path in SOURCES for name in over_the_bars(path)}
    # The constructor that users call.
    assert over == {"optimizer.__init__"}


def test_private_names_stay_in_their_folder() -> None:
    assert {path.stem: found for path in SOURCES if (found := strangers(path))} == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {path: ".".join(("flatopt", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in SOURCES}
    modules = {path: name.removesuffix(".__init__") for path, name in names.items()}
    known = set(modules.values())
    imported = {
        module: {name if name in known else name.rpartition(".")[0] for name in imports(path)}
        for path, module in modules.items()
    }
    assert len(known) == len(SOURCES) and set().union(*imported.values()) <= known
    assert not circles(imported)


def test_checks_of_structure_see_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "metatrain" / "estimators" / "one.py"
    for folder in ("rules", "metatrain/estimators"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "rules" / "adam.py").touch()
    path.write_text("from ..._torch import a\nfrom .._ranks import b\nfrom . import _other\nimport flatopt.__main__")
    assert strangers(path) == []
    path.write_text("def late():\n    from ...rules import _rule")
    assert strangers(path) == ["flatopt.rules._rule"]
    path.write_text("from ...rules.adam import _moments")
    assert strangers(path) == ["flatopt.rules.adam._moments"]

    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}

    path.write_text("class A:\n    @property\n    def f(self):\n" + 57 * "        1\n")
    assert over_the_bars(path) == []
    path.write_text("class A:\n    @property\n    def f(self):\n" + 59 * "        1\n")
    assert over_the_bars(path) == ["one.f"]
    path.write_text("def f(a, /, b, c, *d, e, **g): ...\ndef h(a, /, b, c, d, e, f, *g, h, **i): ...")
    assert over_the_bars(path) == ["one.h"]


def private_names(path: Path) -> list[str]:
    """Return the private names of torch in a source file: imported, reached by dots, or in a string."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.count(" "):
            found.append(node.value)
    return [name for name in found if re.fullmatch(r"torch(\.\w+)*?\._[a-z]\w*(\.\w+)*", name)]


def test_private_names_of_torch_are_used_in_two_files() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in SOURCES if private_names(path)}
    assert users == {"_torch.py", "metatrain/_record.py"}


def test_reader_of_private_names_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "rule.py"
    forms = {
        "import torch._dynamo": ["torch._dynamo"],
        "from torch.utils import _pytree as pytree": ["torch.utils._pytree"],
        "from torch._functorch.compile_utils import fx_graph_cse": ["torch._functorch.compile_utils.fx_graph_cse"],
        "torch._foreach_copy_(a, b)": ["torch._foreach_copy_"],
        "sys.modules.get('torch._subclasses.fake_tensor')": ["torch._subclasses.fake_tensor"],
        "from ._torch import pytree": [],
        "torch.optim.Optimizer.__getstate__(self)": [],
        "torch.add(state._replace(a=1), torch.__version__)": [],
    }
    for source, names in forms.items():
        path.write_text(source)
        assert private_names(path) == names, source


def run_python(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_flatopt_loads_only_what_training_needs() -> None:
    # What torch itself loads (numpy, for one, where installed) does not count.
    code = """
import json, sys
import torch
before = set(sys.modules)
import flatopt
flatopt.FlatOpt
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(run_python(code))
    rooms = {name.split(".")[1] for name in loaded if name.startswith("flatopt.")}
    assert {room for room in rooms if not room.startswith("_")} == {"rules", "pretrained", "hub", "optimizer"}
    others = {name.split(".")[0] for name in loaded}
    assert not others & {
        "huggingface_hub",
        "sklearn",
        "matplotlib",
        "tqdm",
        "tensorboard",
        "requests",
        "httpx",
        "datasets",
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the installed hatchling, so that no network is needed."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("flatopt-*.whl")
    return built


def test_wheel_holds_the_package_and_the_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"flatopt/{path.relative_to(PACKAGE).as_posix()}" for path in SOURCES} | {"flatopt/py.typed"}
    shipped = [path for path in (ROOT / "pretrained").rglob("*") if path.is_file()]
    assert ROOT / "pretrained" / "flat-v2" / "model.safetensors" in shipped
    expected |= {f"flatopt/_pretrained/{path.relative_to(ROOT / 'pretrained').as_posix()}" for path in shipped}
    assert expected <= names
    assert {name.split("/")[0] for name in names} == {"flatopt", f"{wheel.name.split('-py3')[0]}.dist-info"}


def test_source_archive_holds_everything_that_git_tracks(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    missing = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()} - held
    assert not missing


def test_wheel_requires_exactly_three_distributions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        (scripts,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
        commands = archive.read(scripts).decode()
    required = [line for line in headers.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in required) == ["huggingface-hub", "safetensors", "torch"]
    for extra, modules in EXTRAS.items():  # installs what the commands ask for
        lines = [line for line in headers.get_all("Requires-Dist", []) if line.endswith(f"extra == '{extra}'")]
        assert set(modules) <= {line.split(">")[0].replace("scikit-learn", "sklearn") for line in lines}
    assert set(headers.get_all("Provides-Extra", [])) == {"train", "eval", "test", "docs", "integrations"}
    assert headers["License-Expression"] == "Apache-2.0"
    assert "flatopt-train = flatopt.__main__:train" in commands
    assert "flatopt-eval = flatopt.__main__:evaluate" in commands


@pytest.mark.slow
def test_optimizer_works_from_the_wheel_outside_the_checkout_without_network(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)  # what pip does with a pure Python wheel, scripts aside
    code = f"""
import socket, sys
def refuse(*arguments): raise OSError("network is off")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, {str(tmp_path)!r})
import flatopt, torch
assert flatopt.__file__.startswith({str(tmp_path)!r}), flatopt.__file__
model = torch.nn.Linear(4, 2)
before = model.weight.clone()
optimizer = flatopt.FlatOpt(model.parameters())
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
assert not torch.equal(before, model.weight)
"""
    run_python(code, cwd=tmp_path)


def test_rules_are_saved_and_read_without_numpy(tmp_path: Path) -> None:
    code = f"""
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")  # torch says that it would like to have it
import flatopt
learned = flatopt.load_pretrained("flat-v2")
learned.save_pretrained({str(tmp_path / "saved")!r})
assert flatopt.load_pretrained({str(tmp_path / "saved")!r}).sha256 == learned.sha256
"""
    run_python(code)


@pytest.mark.parametrize("module", ["flatopt.evaluate.cli", "flatopt.metatrain.cli"])
def test_commands_show_their_help_without_the_packages_of_their_extras(module: str) -> None:
    code = f"""
import sys, warnings
for name in ("numpy", "scipy", "sklearn", "matplotlib", "tqdm"):
    sys.modules[name] = None
warnings.simplefilter("ignore")  # torch says that it would like to have numpy
from {module} import main
try:
    main(["--help"])
except SystemExit as stopped:
    assert stopped.code in (None, 0)
"""
    run_python(code)


@pytest.mark.parametrize("command", ["train", "eval", "demo"])
def test_ctrl_c_while_a_command_is_loading_is_one_line(command: str) -> None:
    code = f"""
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
from flatopt.__main__ import main
main([{command!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1), done.stderr


def test_the_package_offers_its_names_and_rooms_and_no_others() -> None:
    code = """
import sys
import flatopt
assert "torch" not in sys.modules
assert set(flatopt.__all__) <= set(dir(flatopt))
for name in flatopt.__all__ + ["flatness", "rules"]:
    assert getattr(flatopt, name) is not None
assert not hasattr(flatopt, "FlatOptimizer")
"""
    run_python(code)
