"""What the plugin relies on in vLLM's Gated Delta Net layer, checked on vLLM's source text.

Nothing is imported and no GPU is needed: the same check runs before anything is replaced in a live engine, in
``vllm-gdn-plugin check``, and on the source tree or wheel of a release that is not installed.
"""

import ast
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_gdn_plugin.versions import SUPPORTED_RANGE

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

GDN_CLASSES = {
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn": "QwenGatedDeltaNetAttention",  # 0.22 to 0.33
    "vllm.model_executor.layers.mamba.gdn_linear_attn": "GatedDeltaNetAttention",  # 0.20 and 0.21
}
"""Where the layer is found: module and class, newest first."""

HELPERS = {
    "vllm.config.vllm": ("get_current_vllm_config",),
    "vllm.distributed.parallel_state": (
        "get_pcp_group",
        "get_pp_group",
        "get_tp_group",
        "model_parallel_is_initialized",
    ),
    "vllm.envs": ("environment_variables", "compile_factors"),
    "vllm.forward_context": ("get_forward_context", "ForwardContext.no_compile_layers"),
    "vllm.logger": ("init_logger",),
    "vllm.model_executor.custom_op": ("PluggableLayer.__new__", "op_registry_oot"),
    "vllm.model_executor.layers.linear": ("UnquantizedLinearMethod.apply", "MergedColumnParallelLinear"),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizeMethodBase.process_weights_after_loading",),
    "vllm.utils.torch_utils": (
        "LayerNameType",
        "_current_stream_tls",
        "_encode_layer_name",
        "_resolve_layer_name",
        "aux_stream",
        "direct_register_custom_op",
    ),
}
"""What the plugin calls in vLLM, besides the layer: module, and names or ``Class.member`` in it."""

PROJECTIONS = ("in_proj_qkvz", "in_proj_ba")
FORWARDS = ("forward_cuda", "forward_cpu")
"""The forward methods that the plugin replaces; the second exists from 0.21 on."""

SIGNATURES = (["self", "hidden_states"], ["self", "hidden_states", "output"])
SHAPE_ONLY = ("size", "shape", "dtype", "device")
"""What the stock body may use of ``hidden_states`` besides giving it to the projections."""

UPSTREAM_OVERLAP = ("gdn_in_proj", "maybe_execute_in_parallel", "execute_in_parallel", "in_proj_qkvzba", "in_proj")
"""What ``forward_cuda`` hands ``hidden_states`` to when vLLM itself overlaps or fuses the projections."""

LORA_PROJECTION = "in_proj_qkv"
"""0.20 has a branch ``if hasattr(self, "in_proj_qkv")`` for LoRA; the plugin never takes it."""


UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What reading and parsing a source can raise, be it missing, damaged, encrypted or hostile (RecursionError)."""


@dataclass(frozen=True)
class Contract:
    """The outcome of a check: where the class is, and every point that does not hold."""

    module: str | None
    class_name: str | None
    breaches: tuple[str, ...] = ()
    superseded: bool = False
    """vLLM overlaps or fuses the projections itself: the plugin is not needed any more."""

    @property
    def holds(self) -> bool:
        return not self.breaches and not self.superseded

    @property
    def reason(self) -> str:
        if self.superseded:
            return (
                "this vLLM already runs the two GDN input projections together by itself: the plugin is not needed"
                " any more and stands down; you can uninstall vllm-gdn-plugin"
            )
        if self.breaches:
            return (
                f"this vLLM is not as the plugin expects it: {'; '.join(self.breaches)};"
                f" upgrade vllm-gdn-plugin, or use a release of vLLM {SUPPORTED_RANGE}"
            )
        return f"{self.module}.{self.class_name} is as the plugin expects it"


def check_contract(package: "Traversable") -> Contract:
    """Check the sources of the package ``vllm``: a directory, or a directory inside a wheel.

    Never raises on content: a file that is missing or cannot be parsed is a breach.
    """
    module = layer_module(package)
    if module is None:
        return Contract(None, None, (f"the GDN layer has moved: there is neither {' nor '.join(GDN_CLASSES)}",))
    class_name = GDN_CLASSES[module]
    try:
        defined = [node for node in parse(package, module).body if isinstance(node, ast.ClassDef)]
        classes = [node for node in defined if node.name == class_name]
        if len(classes) != 1:
            found = "no" if not classes else "more than one"
            others = [node.name for node in defined if node not in classes and all(_uses(node, p) for p in PROJECTIONS)]
            renamed = f", it may now be {' or '.join(others)}" if others else ""
            return Contract(module, class_name, (f"there is {found} class {class_name} in {module}{renamed}",))
        breaches = _layer_breaches(classes[0])
        superseded = _overlaps_by_itself(classes[0])
        breaches += [*missing_helpers(package, HELPERS), *_construction_breaches(package)]
        return Contract(module, class_name, tuple(breaches), superseded)
    except UNREADABLE as error:
        why = f"{type(error).__name__}: {error}"
        return Contract(module, class_name, (f"the source of {module} cannot be read: {why}",))


def layer_module(package: "Traversable") -> str | None:
    """The module that holds the layer in these sources, or None where there is none that the plugin knows."""
    return next((module for module in GDN_CLASSES if _file(package, module).is_file()), None)


def _file(package: "Traversable", module: str) -> "Traversable":
    path = package
    *folders, name = module.split(".")[1:]
    for folder in folders:
        path = path / folder
    return path / f"{name}.py"


def parse(package: "Traversable", module: str) -> ast.Module:
    return ast.parse(_file(package, module).read_text(encoding="utf-8"))


def missing_helpers(package: "Traversable", helpers: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """What of ``helpers``, names by module, these sources do not define."""
    for module, names in helpers.items():
        try:
            defined = _definitions(parse(package, module))
        except UNREADABLE:
            yield f"there is no readable module {module}"
            continue
        yield from (f"there is no {module}.{name}" for name in names if name not in defined)


def _definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """Names bound at the top level of a module, also below ``if``, ``try`` and ``with``, and ``Class.member``."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(prefix + node.name)
        elif isinstance(node, ast.ClassDef):
            names.add(prefix + node.name)
            if not prefix:
                names |= _definitions(node, f"{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(prefix + n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(prefix + (alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            pending += ast.iter_child_nodes(node)
    return names


def _layer_breaches(layer: ast.ClassDef) -> list[str]:
    methods = {n.name: n for n in layer.body if isinstance(n, ast.FunctionDef)}
    breaches = []
    for name in FORWARDS:
        bound = [n for n in layer.body if name in _definitions(ast.Module([n], []))]
        if bound and (len(bound) > 1 or not isinstance(bound[0], ast.FunctionDef) or bound[0].decorator_list):
            breaches.append(f"{name} is not one plain method")
    if not any(ast.unparse(d).startswith("PluggableLayer.register(") for d in layer.decorator_list):
        breaches.append(f"{layer.name} is not registered as a PluggableLayer")
    if any("__new__" in _definitions(ast.Module([n], [])) for n in layer.body):
        breaches.append(f"{layer.name} has a __new__ of its own")
    if "forward_cuda" not in methods:
        breaches.append(f"{layer.name} has no method forward_cuda")
    elif not any(_uses(m, "forward_cuda") for n, m in methods.items() if n in ("__init__", "forward")):
        breaches.append("neither __init__ nor forward chooses forward_cuda")
    for name in FORWARDS:
        if name in methods:
            breaches += (f"{name}: {b}" for b in _forward_breaches(methods[name], methods))
    return breaches


def _forward_breaches(forward: ast.FunctionDef, methods: dict[str, ast.FunctionDef]) -> Iterator[str]:
    arguments = [a.arg for a in forward.args.args]
    if arguments not in SIGNATURES or forward.args.vararg or forward.args.kwonlyargs or forward.args.kwarg:
        yield f"its arguments are ({ast.unparse(forward.args)})"
        return
    body = _main_path(forward.body)
    parents = {child: node for top in body for node in ast.walk(top) for child in ast.iter_child_nodes(node)}
    nodes = [node for top in body for node in ast.walk(top)]

    for name in PROJECTIONS:
        counts = {count for count, _ in _calls_by_path(body, name)}
        if counts != {1}:
            found = " or ".join(map(str, sorted(counts)))
            yield f"self.{name}(hidden_states) is called {found} times on the main path, where once is expected"
    for node in nodes:
        if (
            isinstance(node, ast.Attribute)
            and node.attr in PROJECTIONS
            and not _is_call_of(parents.get(node), node.attr)
        ):
            yield f"line {node.lineno} uses {node.attr} for something other than {node.attr}(hidden_states)"
        if isinstance(node, ast.Name) and node.id == "hidden_states" and not _is_allowed_use(node, parents):
            yield f"line {node.lineno} uses hidden_states for more than its size, dtype and device"
        if isinstance(node, ast.Name) and node.id in ("self", "super") and not _reads_attribute(node, parents):
            yield f"line {node.lineno} uses {node.id} for more than reading an attribute"
    for helper in sorted(_called_methods(body, methods)):
        if any(_uses(methods[helper], name) for name in PROJECTIONS):
            yield f"it calls {helper}, which uses the projections itself"


def _main_path(body: list[ast.stmt]) -> list[ast.stmt]:
    """The body without 0.20's LoRA branch, and without a docstring."""
    kept: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == f"hasattr(self, '{LORA_PROJECTION}')":
            kept += statement.orelse
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            kept.append(statement)
    return kept


def _calls_by_path(body: list[ast.stmt], name: str) -> set[tuple[int, bool]]:
    """(calls of the projection, has returned) for every way through the statements.

    Ways through other blocks than ``if`` and ``with`` are not followed: a call in one, or in a conditional
    expression, counts twice, because it cannot be relied on, and a ``return`` in one may or may not be taken.
    """
    paths = {(0, False)}
    for statement in body:
        if isinstance(statement, ast.If):
            test = _calls_in(statement.test, name)
            inner = {
                (test + count, ended)
                for branch in (statement.body, statement.orelse)
                for count, ended in _calls_by_path(branch, name)
            }
        elif isinstance(statement, ast.With):
            entered = sum(_calls_in(item, name) for item in statement.items)
            inner = {(entered + count, ended) for count, ended in _calls_by_path(statement.body, name)}
        else:
            calls = _calls_in(statement, name)
            inner = {(calls, isinstance(statement, (ast.Return, ast.Raise)))}
            if not isinstance(statement, NESTED) and any(isinstance(n, ast.Return) for n in ast.walk(statement)):
                inner.add((calls, True))
        paths = {p for p in paths if p[1]} | {(p[0] + c, e) for p in paths if not p[1] for c, e in inner}
    return paths


def _calls_in(root: ast.AST, name: str) -> int:
    calls = sum(_is_call_of(node, name) for node in ast.walk(root))
    inside = any(
        _is_call_of(node, name) for block in ast.walk(root) if isinstance(block, UNSURE) for node in ast.walk(block)
    )
    return calls + inside


NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
"""What is only run when something calls it."""

CERTAIN = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Assert, ast.Expr, ast.If, ast.Raise, ast.Return, ast.With)
"""Statements whose expressions are run once whenever they are reached."""

UNSURE = (
    *NESTED,
    *(kind for kind in ast.stmt.__subclasses__() if kind not in (*CERTAIN, *NESTED)),
    *(ast.IfExp, ast.BoolOp, ast.Compare, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
"""Where a call may run never, or many times."""


def _is_call_of(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node) == f"self.{name}(hidden_states)"


def _is_allowed_use(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents.get(node)
    if any(_is_call_of(parent, name) for name in PROJECTIONS):
        return True
    reads = isinstance(parent, ast.Attribute) and isinstance(parent.ctx, ast.Load)
    return isinstance(node.ctx, ast.Load) and reads and getattr(parent, "attr", "") in SHAPE_ONLY


def _reads_attribute(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    """``self.x`` that is read, or ``hasattr(self, ...)``: all that a stand-in for the layer can serve."""
    parent = parents.get(node)
    if isinstance(parent, ast.Call):
        return node.id == "self" and isinstance(parent.func, ast.Name) and parent.func.id == "hasattr"
    return node.id == "self" and isinstance(parent, ast.Attribute) and isinstance(parent.ctx, ast.Load)


def _called_methods(body: list[ast.stmt], methods: dict[str, ast.FunctionDef]) -> set[str]:
    """Methods of the class that the statements reach through ``self``, directly or through one another."""
    reached: set[str] = set()
    pending: list[ast.AST] = list(body)
    while pending:
        for node in ast.walk(pending.pop()):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and node.attr in methods
                and node.attr not in reached
            ):
                reached.add(node.attr)
                pending.append(methods[node.attr])
    return reached


def _uses(code: ast.AST, attribute: str) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == attribute for n in ast.walk(code))


def _overlaps_by_itself(layer: ast.ClassDef) -> bool:
    """Whether ``forward_cuda``, on its main path, hands the input to something that overlaps or fuses the projections
    in place of calling them, or calls one of them on a stream of its own. What else it overlaps is not the plugin's
    business."""
    forward = next((n for n in layer.body if isinstance(n, ast.FunctionDef) and n.name == "forward_cuda"), None)
    body = _main_path(forward.body) if forward else []
    calls_both = all({count for count, _ in _calls_by_path(body, name)} == {1} for name in PROJECTIONS)
    for node in (node for top in body for node in ast.walk(top)):
        if not calls_both and isinstance(node, ast.Call) and _last_name(node.func) in UPSTREAM_OVERLAP:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any("hidden_states" in _names(argument) for argument in given):
                return True
        if isinstance(node, ast.With) and any("stream" in ast.unparse(item).lower() for item in node.items):
            inside = [name for name in PROJECTIONS if any(_is_call_of(inner, name) for inner in ast.walk(node))]
            if len(inside) == 1:
                return True
    return False


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _names(code: ast.AST) -> set[str]:
    return {
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(code)
        if isinstance(n, (ast.Attribute, ast.Name))
    }


def _construction_breaches(package: "Traversable") -> Iterator[str]:
    """How vLLM makes a pluggable layer: of the class that the registry holds for its name, else of its own."""
    module = "vllm.model_executor.custom_op"
    try:
        body = parse(package, module).body
    except UNREADABLE:
        return  # it is named among the helpers
    classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == "PluggableLayer"]
    for new in (n for c in classes for n in c.body if isinstance(n, ast.FunctionDef) and n.name == "__new__"):
        returned = [ast.unparse(n.value) for n in ast.walk(new) if isinstance(n, ast.Return) and n.value]
        as_expected = (
            ast.unparse(new.args) == "cls, *args, **kwargs"
            and {"op_registry_oot", "__name__"} <= _names(new)
            and len(returned) == 1
            and returned[0].startswith("super().__new__(")
        )
        if not as_expected:
            yield f"{module}.PluggableLayer.__new__ does not look a layer's class up by its name and make one of it"
