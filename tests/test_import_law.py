"""The allowed imports between modules, read from the source, so that lazy imports count, too.

actors.config, actors.api.generation, actors.decoding  <-  actors.engine, actors.wire  <-  the rest of actors
<-  router  <-  cluster
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.deadlines import HANG_S

ROOT = Path(__file__).parent.parent
EVERYTHING = ("actors", "router", "cluster", "benchmarks")
BOTTOM = ("actors.config", "actors.api", "actors.decoding")
HEAVY = ("torch", "transformers", "safetensors", "accelerate", "peft")
# Only model processes may load torch, so other modules import the engine inside functions.
LAZY = {
    "actors.replica.build": {
        "actors.engine.loader",
        "actors.engine.parallel",
        "actors.engine.step_engine",
        "actors.engine.vllm_runner",
    },
    "actors.serve.model": {"actors.engine.parallel"},
}
# Modules of the engine that import no torch: its messages, errors and arithmetic on configs.
WITHOUT_TORCH = tuple(
    f"actors.engine.{each}" for each in ("interface", "errors", "memory", "sizing", "compat", "weight_files")
)
MAY_USE_TORCH = (
    "actors.engine",
    "cluster.demo.train",
    "cluster.demo.accuracy",
    *(f"cluster.real.{module}" for module in ("anchored", "gguf_conversion", "train")),
    *(f"cluster.jobs.dpo.{module}" for module in ("event_logprobs", "scoring", "trainer", "fit")),
    "benchmarks",
)
MAY_USE_RAY = (
    *(f"actors.serve.{module}" for module in ("application", "coordinator", "directory", "model", "ray_metrics")),
    *("router.app", "cluster", "benchmarks"),
)

UNPICKLERS = (
    "pickle",
    "cloudpickle",
    "ray.cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "multiprocessing.managers",
)
UNPICKLING_CALLS = ("_object_list", "torch.load", "yaml.unsafe_load", "pickle.loads")


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package in EVERYTHING:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def inside(name: str, *packages: str) -> bool:
    """True if a dotted name is one of the packages or is in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports under a node, also in functions, except those for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not is_type_checking(child):
            yield from import_statements(child)


def names(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that a statement imports; `from package import module` counts as the module."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    assert statement.level == 0, "imports are absolute"
    assert statement.module is not None
    for alias in statement.names:
        submodule = f"{statement.module}.{alias.name}"
        yield submodule if submodule in modules() else statement.module


@cache
def imports(module: str) -> frozenset[str]:
    """The names that a module imports, in functions, too."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return frozenset(name for statement in import_statements(tree) for name in names(statement))


@cache
def calls(module: str) -> frozenset[str]:
    """The calls in a module as written: `torch.load`, `dist.broadcast`."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return frozenset(ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def strays(
    importers: tuple[str, ...],
    banned: tuple[str, ...],
    allowed: tuple[str, ...] = (),
    *,
    spared: tuple[str, ...] = (),
) -> list[str]:
    """`module -> name` for imports by `importers`, except `spared` ones, from `banned` and not from `allowed`."""
    return [
        f"{module} -> {name}"
        for module in modules()
        if inside(module, *importers) and not inside(module, *spared)
        for name in sorted(imports(module) - LAZY.get(module, set()))
        if inside(name, *banned) and not inside(name, *allowed)
    ]


def test_the_bottom_layer_imports_only_itself() -> None:
    assert strays(BOTTOM, EVERYTHING, BOTTOM) == []


def test_the_method_needs_numpy_numba_and_llguidance_only() -> None:
    allowed = (*sys.stdlib_module_names, "numpy", "numba", "llvmlite", "llguidance", *BOTTOM)
    others = [
        f"{module} -> {name}"
        for module in modules()
        if inside(module, "actors.decoding")
        for name in sorted(imports(module))
        if not inside(name, *allowed)
    ]
    assert others == []


def test_engine_and_wire_import_the_bottom_layer_only() -> None:
    assert strays(("actors.engine",), EVERYTHING, (*BOTTOM, "actors.engine")) == []
    assert strays(("actors.wire",), EVERYTHING, (*BOTTOM, "actors.wire")) == []


def test_imports_go_downwards() -> None:
    assert strays(("actors",), ("router", "cluster", "benchmarks")) == []
    assert strays(("router",), ("cluster", "benchmarks")) == []
    assert strays(("cluster",), ("benchmarks",)) == []


def test_only_engine_and_training_import_torch() -> None:
    assert strays(EVERYTHING, HEAVY, spared=MAY_USE_TORCH) == []


def test_only_model_processes_load_the_engine() -> None:
    assert strays(EVERYTHING, ("actors.engine",), WITHOUT_TORCH, spared=MAY_USE_TORCH) == []


def test_the_engines_interface_imports_no_torch() -> None:
    assert strays(WITHOUT_TORCH, (*HEAVY, "actors.engine"), WITHOUT_TORCH) == []


def test_only_shells_import_ray() -> None:
    assert strays(EVERYTHING, ("ray",), spared=MAY_USE_RAY) == []


def test_no_bytes_from_a_network_are_unpickled() -> None:
    """Exempt are Ray's own calls and a benchmark's pipes to its children. Ranks exchange bytes."""
    assert strays(EVERYTHING, UNPICKLERS) == []
    written = {module: calls(module) for module in modules()}
    assert [f"{m}: {c}" for m, said in written.items() for c in said if c.endswith(UNPICKLING_CALLS)] == []
    assert [m for m, said in written.items() if inside(m, "actors", "router") and "pipe.recv" in said] == []


def test_every_allowed_lazy_import_is_used() -> None:
    for module, lazy in LAZY.items():
        assert imports(module) & lazy, f"{module} imports none of {sorted(lazy)}"


@pytest.mark.parametrize(
    "module", ["router.api", "actors.coordinator.coordinator", "actors.replica.replica", "actors.preflight"]
)
def test_a_process_without_a_model_starts_without_torch_and_ray(module: str) -> None:
    heavy = (*HEAVY, "ray")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=True
    )
    assert done.stdout.strip() == "[]"


def all_imports(module: str) -> set[str]:
    """The project's modules that a module imports, for the type checker, too."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return {name for statement in found for name in names(statement) if name in modules()}


def folder(module: str) -> str:
    """The folder of `actors` that holds a module; the module itself at the top of `actors` and elsewhere."""
    return ".".join(module.split(".")[:2])


def test_modules_have_no_import_cycle() -> None:
    """Type-only imports count: modules that need each other belong together."""
    TopologicalSorter({module: all_imports(module) for module in modules()}).prepare()


def test_folders_of_actors_have_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for module in modules():
        if inside(module, "actors"):
            graph.setdefault(folder(module), set()).update(folder(name) for name in all_imports(module))
    TopologicalSorter({name: others - {name} for name, others in graph.items()}).prepare()


def test_the_top_of_actors_has_at_most_six_modules() -> None:
    top = [module for module in modules() if module.count(".") == 1 and inside(module, "actors")]
    assert len([module for module in top if modules()[module].name != "__init__.py"]) <= 6
