"""The house: imports go down only, public names, light imports, declared dependencies, recipes, how quick --help is."""

import ast
import importlib.metadata
import inspect
import json
import re
import resource
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import emae

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "emae"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# From the ground up. A module imports from lower lines only; siblings on one line never import each other.
LEVELS = [
    "_config _geometry _threads",
    "_formats",
    "_volume",
    "_phantom _patches _normalise",
    "_datasets",
    "_augment _view",
    "_decode _evaluate _targets _sampling models._vit",
    "models._mae models._segmenter",
    "_baselines _experiments",
    "_runs",
    "_predict _fit",
    "_pretrain _finetune",
    "_segment",
    "recipes.general",
    "recipes.phantom recipes.fib25 recipes.isbi2012",
    "recipes",
    "_report",
    "_demo",
    "cli",
    "__main__",
]
LEVEL = {module: k for k, line in enumerate(LEVELS) for module in line.split()}
NO_TORCH = (
    "_config _geometry _threads _formats _volume _phantom _normalise _datasets _view _decode _evaluate cli".split()
)
TRAINING = "_pretrain _finetune _fit _runs _predict _baselines recipes models._mae models._segmenter".split()


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `emae.`; packages without code of their own are left out."""
    names = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in sorted(SOURCE.rglob("*.py"))}
    names = {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}
    return {name: path for name, path in names.items() if path.read_text().count("import") or name in LEVEL}


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted name, line) of everything a file imports, inside functions too; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def own_module(dotted: str) -> str | None:
    """The module of the package that `emae.a.b.name` lies in."""
    parts = dotted.split(".")[1:]
    while parts and ".".join(parts) not in LEVEL:
        parts.pop()
    return ".".join(parts) or None


def faults_of(name: str, path: Path) -> list[str]:
    faults = []
    for dotted, line in imports(path):
        if dotted.split(".")[0] != "emae":
            continue
        target = own_module(dotted)
        if target is None and dotted != "emae":
            faults.append(f"{name}:{line} imports {dotted}, which has no place in LEVELS")
        elif target is not None and LEVEL[target] >= LEVEL[name]:
            faults.append(f"{name}:{line} imports {target}, which is not below it")
    if name not in ("cli", "__main__"):  # `import emae` elsewhere is for the version alone: its other names lie higher
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "emae":
                if node.attr != "__version__":
                    faults.append(f"{name}:{node.lineno} reaches up through emae.{node.attr}")
    return faults


def test_imports_go_down_only():
    found = modules()
    assert not found.keys() - LEVEL.keys(), "give them a place in LEVELS"
    assert not [fault for name, path in found.items() for fault in faults_of(name, path)]


def test_an_import_going_up_or_sideways_is_found(tmp_path):
    """The test above can fail: up, sideways, unknown, through the package, inside a function."""
    file = tmp_path / "_volume.py"
    lines = "import emae", "def f():", "    from emae._runs import Run", "    from emae import cli", "    emae.score()"
    lines += "from emae._volume import x", "from emae._attic import y", "from emae._geometry import Box"
    file.write_text("\n".join(lines))
    assert [fault.split()[0] for fault in faults_of("_volume", file)] == [f"_volume:{n}" for n in (6, 7, 3, 4, 5)]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_emae_is_light():
    loaded = python("import sys; old = set(sys.modules); import emae; print(*(set(sys.modules) - old))").split()
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"emae"}


def test_looking_and_scoring_need_no_torch():
    code = "".join(f"import emae.{name}\n" for name in NO_TORCH)
    assert python(f"{code}import sys; print('torch' in sys.modules)").strip() == "False"
    used = "import sys, emae; emae.open_volume; emae.score; emae.decode; emae.show; print('torch' in sys.modules)"
    assert python(used).strip() == "False"


def import_names(requirements: list[str]) -> set[str]:
    """What the distributions of these requirements are imported as."""
    wanted = {canonicalize_name(Requirement(r).name) for r in requirements}
    table = importlib.metadata.packages_distributions()
    return {name for name, owners in table.items() if wanted & {canonicalize_name(o) for o in owners}}


def test_training_imports_with_torch_numpy_pydantic_alone():
    blocked = import_names(PROJECT["dependencies"]) - {"torch", "torchgen", "functorch", "numpy", "pydantic"}
    assert {"tensorstore", "h5py", "PIL", "skimage", "typer", "safetensors", "scipy"} <= blocked
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""
    python(code + "".join(f"import emae.{name}\n" for name in TRAINING))
    with pytest.raises(AssertionError, match="tensorstore is blocked"):  # the blocker blocks
        python(code + "import tensorstore")


def third_party(*folders: Path) -> set[str]:
    files = [file for folder in folders for file in folder.rglob("*.py")]
    local = {file.stem for file in files} | {"emae"}
    return {dotted.split(".")[0] for file in files for dotted, _ in imports(file)} - sys.stdlib_module_names - local


def test_every_import_is_declared_and_every_dependency_used():
    core = import_names(PROJECT["dependencies"])
    used = third_party(SOURCE)
    assert not used - core, "imported, not among the dependencies of pyproject.toml"
    for requirement in PROJECT["dependencies"]:
        assert import_names([requirement]) & used, f"{requirement} is declared, and never imported"
    extras = [r for name in ("dev", "bench") for r in PROJECT["optional-dependencies"][name]]
    here = third_party(ROOT / "tests", ROOT / "benchmarks") - {"monai", "einops"}  # those two: the bench extra alone
    assert not here - core - import_names(extras), "imported by tests or benchmarks, not declared"


def installed_with(requirements: list[str], stop: frozenset[str] = frozenset()) -> set[str]:
    """Every distribution that installing these brings along, by the metadata of what is installed here."""
    seen: set[str] = set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or name in stop:
            continue
        seen.add(name)
        for more in map(Requirement, importlib.metadata.requires(name) or []):
            extras = ["", *requirement.extras]
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in extras):
                todo.append(more)
    return seen


def test_core_install_is_small():
    torch = installed_with(["torch"])
    packages = installed_with(PROJECT["dependencies"]) - torch
    print(len(packages), "packages beside torch's own", len(torch))
    assert len(packages) < 60
    assert {"numpy", "typing-inspection"} <= packages and "tensorboard" not in packages


def test_constraints_pin_everything_declared():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)  # exact, no local part (+cpu)
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    declared = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        assert name in pins and requirement.specifier.contains(pins[name]), requirement
    local = installed_with(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    machine = {"pip", "triton", "setuptools"}  # and what torch's own builds for other machines need
    assert not {n for n in local - pins.keys() - machine if not n.startswith(("nvidia", "cuda"))}


def test_help_is_quick():
    """`emae --help` within half a second of a bare interpreter: processor time, best of five, whatever runs beside."""

    def best(*arguments: str) -> tuple[float, float]:
        times = []
        for _ in range(5):
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            times.append((spent, time.perf_counter() - start))
        return min(times)

    (bare, bare_wall), (with_help, wall) = best("-c", "pass"), best("-m", "emae", "--help")
    print(
        f"bare interpreter {bare:.3f} s ({bare_wall:.3f} s by the clock), emae --help {with_help:.3f} s ({wall:.3f} s)"
    )
    assert with_help - bare < 0.5


def test_public_names_are_listed_documented_and_loaded():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    for_checkers = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = set(emae.__all__) - {"__version__"}
    assert public == for_checkers - {"TYPE_CHECKING", "Any"}
    guide = (ROOT / "docs" / "guide.md").read_text().split("## Names of the package")[1].split("\n## ")[0]
    assert public == set(re.findall(r"^\| `(\w+)", guide, re.MULTILINE))
    for name in public:
        assert name == "DATASETS" or inspect.getdoc(getattr(emae, name)), f"emae.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'predictt'"):
        _ = emae.predictt
    assert dir(emae) == sorted(emae.__all__)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", emae.recipes.RECIPES)
def test_recipes_load_and_round_trip(name, kind):
    make = getattr(emae.recipes.recipe(name), kind)
    config = make()
    assert make.__doc__ and config.kind == kind
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert type(config).model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_recipe_of_a_pair_share_the_encoder():
    for name, pair in emae.recipes.RECIPES.items():
        assert pair.pretrain().model.encoder == pair.finetune().model.encoder, name


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are the project's own is not known")
    texts = (".py", ".md", ".toml", ".txt", "", ".json")
    files = [ROOT / line for line in listed.stdout.splitlines() if Path(line).suffix in texts and line != "LICENSE"]
    return [file for file in files if file.is_file()]


def test_no_absolute_paths_and_nothing_left_to_do():
    places = re.compile("(?<![\\w.:/])/(" + "|".join(("home", "root", "work", "tmp", "Users", "mnt")) + r")/\w")
    later = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
    assert places.search("see /" + "home/me") and not places.search("a/home/b")
    faults = []
    for file in tracked():
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if places.search(line) or later.search(line):
                faults.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not faults
