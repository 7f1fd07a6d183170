"""Imports point one way, and no two rooms need each other."""

import ast
import functools
from pathlib import Path

SRC = Path(__file__).parents[2] / "src" / "oarsmith"

# From the top down; a room imports from its own layer and those below.
LAYERS = (
    {"__init__", "__main__", "cli", "commands"},
    {"jobs"},
    {"methods", "engine", "serve", "merge", "quantize", "rl"},
    {"loading"},
    {"model_path"},
    {"training", "losses", "adapters", "parallel"},
    {"data", "checkpoint", "native"},
    {"models"},
    {"kernels", "text", "config", "demo"},
    {"atomic", "compiling", "errors", "processes", "_version"},
)
# These import nothing of ours but what lies below them, not even each other.
ALONE = {"kernels", "text", "config", "demo"}


def name_of(relative: Path) -> str:
    parts = ["oarsmith", *relative.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path.relative_to(SRC)): path for path in sorted(SRC.rglob("*.py"))}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(room: str) -> int:
    found = [index for index, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"the room '{room}' stands in no layer: add it to LAYERS and to docs/architecture.md"
    return found[0]


def imported(module: str, tree: ast.AST, *, for_types: bool) -> set[str]:
    """Our modules that a module imports, also inside functions; with or without those under TYPE_CHECKING."""
    found: set[str] = set()
    package = module if NAMES[module].name == "__init__.py" else module.rpartition(".")[0]
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not for_types:
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "oarsmith"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            if base.split(".")[0] == "oarsmith":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    found.add(inner if inner in NAMES else base)
    return found


@functools.cache
def graph(*, for_types: bool) -> dict[str, set[str]]:
    return {
        module: imported(module, ast.parse(path.read_text(encoding="utf-8")), for_types=for_types) - {module}
        for module, path in NAMES.items()
    }


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """A circle of a directed graph, or empty: what is left when leaves are taken away again and again."""
    left = {node: {other for other in others if other in edges} for node, others in edges.items()}
    while True:
        leaves = {node for node, others in left.items() if not others}
        if not leaves:
            return sorted(left)
        left = {node: others - leaves for node, others in left.items() if node not in leaves}


def test_imports_point_down():
    wrong = []
    for module, others in graph(for_types=True).items():
        room = room_of(module)
        for other in others:
            below = room_of(other)
            if layer_of(below) < layer_of(room):
                wrong.append(f"{module} imports {other}, which stands above it")
            if room in ALONE and below != room and below not in LAYERS[-1]:
                wrong.append(f"{module} imports {other}, but {room} may use only what lies below")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_modules():
    assert circle_in(graph(for_types=False)) == []


def test_no_circle_of_rooms():
    rooms: dict[str, set[str]] = {}
    for module, others in graph(for_types=True).items():
        rooms.setdefault(room_of(module), set()).update(room_of(other) for other in others)
    assert circle_in({room: others - {room} for room, others in rooms.items()}) == []


def test_imports_that_do_not_exist():
    wrong = [
        f"{module} imports {other}"
        for module, others in graph(for_types=True).items()
        for other in others
        if other not in NAMES
    ]
    assert not wrong, "\n".join(wrong)


def test_this_test_can_fail():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert circle_in({"a": {"b"}, "b": set()}) == []
    tree = ast.parse("from ..models import spec\nfrom . import hf\nif TYPE_CHECKING:\n    import oarsmith.cli")
    seen = imported("oarsmith.checkpoint.hf", tree, for_types=False)
    assert "oarsmith.models.spec" in seen and "oarsmith.cli" not in seen
    assert "oarsmith.cli" in imported("oarsmith.checkpoint.hf", tree, for_types=True)
