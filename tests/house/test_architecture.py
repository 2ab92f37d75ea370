"""The house rules, checked on the syntax tree: floors, third-party imports, sizes of rooms."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up: folders, and the files beside them. A room may import rooms of lower floors,
# and those before it on its own.
FLOORS: list[list[str]] = [
    ["kernels", "runtime"],
    ["model"],
    ["unmask", "stop", "store"],
    ["decode", "train", "batches", "score"],
    [
        "tokenizer", "parity", "engine", "tasks", "convert", "load", "convert.plan",
        "convert.commands",
    ],
    [
        "viz", "completion", "maps", "llm", "cluster", "arguments", "training", "evaluation",
        "bulk", "generation", "checkup", "server",
    ],
    [
        "eval", "bench", "sweep", "tune", "generate", "sft", "doctor", "launch", "harness", "serve",
        "chat", "convert.__main__", "__main__",
    ],
]  # fmt: skip
# What a room must not import although the order alone would allow it.
FORBIDDEN = {
    ("tasks", "jdllm.convert"),
    ("unmask", "jdllm.model.transformer"),
    ("unmask", "jdllm.model.cache"),
    ("stop", "jdllm.model"),
    ("stop", "jdllm.unmask"),
}
GROUND = {"jax", "numpy", "flax", "optax", "orbax"}
OUTSIDE = GROUND | {
    "datasets",
    "fastapi",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "ml_dtypes",
    "packaging",
    "prometheus_client",
    "ray",
    "rich",
    "safetensors",
    "tokenizers",
    "tqdm",
    "transformers",
    "uvicorn",
    "yaml",
}
# tyro is the command line; Orbax stands on tensorstore, which writes a weight piece by piece.
EXCEPTIONS = {
    "jdllm/runtime/cli.py": {"tyro"},
    "jdllm/runtime/progress.py": {"tqdm"},
    "jdllm/runtime/machine.py": {"huggingface_hub", "packaging"},
    "jdllm/store/checkpoint.py": {"tensorstore"},
    "kernels/triton_call.py": {"jax_triton"},
}
# Doors hold a command line and nothing else; what they call, and what tests test, are rooms.
DOORS = [
    "eval", "sweep", "tune", "bench", "generate", "sft", "doctor", "launch", "harness", "serve",
    "chat",
    "convert.__main__", "__main__",
]  # fmt: skip
MAX_DOOR = 120
MAX_LINES = 420
MAX_FUNCTION = 62


def source_files() -> list[Path]:
    package = [p for p in (ROOT / "jdllm").rglob("*.py") if not p.is_symlink()]
    linked = [ROOT / "jdllm" / "convert", ROOT / "jdllm" / "kernels"]
    inside = [p for p in package if not any(p.is_relative_to(link) for link in linked)]
    return sorted(inside + [*(ROOT / "convert").glob("*.py"), *(ROOT / "kernels").rglob("*.py")])


FILES = source_files()
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("convert", "kernels"):
        parts = ("jdllm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """The room a module belongs to: its own name where listed, else its folder's."""
    top, _, name = module.partition(".")
    rooms = [name for floor in FLOORS for name in floor] if top == "jdllm" else []
    while name and name not in rooms:
        name = name.rpartition(".")[0]
    return name or None


def place(name: str) -> tuple[int, int]:
    return next((i, floor.index(name)) for i, floor in enumerate(FLOORS) if name in floor)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, `from a import b` giving both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_down_only(path: Path):
    own = room(module_name(path))
    if own is None:
        assert module_name(path) in ("jdllm", "jdllm.bundled"), f"{path} stands on no floor"
        return
    names = imports(path)
    for target in {room(name) for name in names} - {own, None}:
        assert target and place(target) < place(own), f"{path} on {place(own)} imports {target}"
    for who, what in FORBIDDEN:
        assert who != own or what not in names, f"{own} must not know {what}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_third_party_imports(path: Path):
    own = room(module_name(path))
    floor = place(own)[0] if own else 0
    allowed = (GROUND if floor <= 3 else OUTSIDE) | EXCEPTIONS.get(
        str(path.relative_to(ROOT)), set()
    )
    if path.stem.endswith("_triton"):
        allowed = allowed | {"triton"}
    used = {name.split(".")[0] for name in imports(path)}
    assert used - set(sys.stdlib_module_names) - {"jdllm"} <= allowed


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_rooms_stay_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} does not say what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_doors_are_thin(path: Path):
    name = module_name(path).removeprefix("jdllm.")
    assert name not in DOORS or len(path.read_text(encoding="utf-8").splitlines()) <= MAX_DOOR


def test_nothing_imports_a_door():
    """But jdllm.harness, by whose import lm-eval comes to know the model."""
    doors = {f"jdllm.{name}" for name in DOORS} - {"jdllm.harness"}
    others = [p for folder in ("tests", "experiments") for p in (ROOT / folder).rglob("*.py")]
    found = {str(p.relative_to(ROOT)): doors & imports(p) for p in FILES + others}
    assert not {path: names for path, names in found.items() if names}


def test_every_folder_of_the_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {module_name(path).rpartition(".")[0] for path in FILES if path.stem != "__init__"}
    inside |= {module_name(path) for path in FILES if path.stem == "__init__"} | {"jdllm.bundled"}
    assert sorted(inside) == sorted(listed)


def test_no_stray_packages():
    """A folder `kernels` with an __init__ would shadow a package that transformers probes for."""
    assert not (ROOT / "convert" / "__init__.py").exists()
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert (ROOT / "jdllm" / "convert").is_symlink()
    assert (ROOT / "jdllm" / "kernels").is_symlink()
    vague = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not vague & {path.name for path in FILES}
