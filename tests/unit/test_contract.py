"""Each edit below is something that an upstream change could do. What the plugin relies on must be missed by name."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path
from typing import Any

import pytest

import vllm_gdn_plugin
from vllm_gdn_plugin.cli.check import open_source
from vllm_gdn_plugin.decide.contract import GDN_CLASSES, HELPERS, check_contract
from vllm_gdn_plugin.versions import SUPPORTED_RANGE

GDN, OLD_GDN = GDN_CLASSES
CLASS = GDN_CLASSES[GDN]

SIZE = "        num_tokens = hidden_states.size(0)\n"
QKVZ = "        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)\n"
BA = "        ba, _ = self.in_proj_ba(hidden_states)\n"
CPU_BA = "        gates, _ = self.in_proj_ba(hidden_states)\n"
FORWARD = "def forward_cuda(self, hidden_states):"
HELPER = "        return mixed_qkvz, self.prefix\n"
ADVICE = f"; upgrade vllm-gdn-plugin, or use a release of vLLM {SUPPORTED_RANGE}"


def after(line: str, *added: str) -> list[tuple[str, str]]:
    return [(line, line + "".join(f"        {text}\n" for text in added))]


def instead_of(line: str, *lines: str) -> list[tuple[str, str]]:
    return [(line, "".join(f"        {text}\n" for text in lines))]


def test_the_stub_as_it_is_passes(sources: Any) -> None:
    contract = check_contract(sources.package)
    assert contract.holds
    assert (contract.module, contract.class_name) == (GDN, CLASS)
    assert contract.reason == f"{GDN}.{CLASS} is as the plugin expects it"


def test_the_old_location_signature_and_lora_branch_pass(sources: Any) -> None:
    sources.make_old()
    contract = check_contract(sources.package)
    assert (contract.module, contract.class_name, contract.breaches) == (OLD_GDN, GDN_CLASSES[OLD_GDN], ())


ACCEPTED = {
    "no forward_cpu, as in 0.20": [("def forward_cpu(", "def forward_native(")],
    "forward chooses, not __init__": [
        ("self._forward_method = self.forward_cuda", "pass"),
        ("return self._forward_method(hidden_states)", "return self.forward_cuda(hidden_states)"),
    ],
    "one call in each branch": instead_of(
        BA, "if self.prefix:", f"    {BA.strip()}", "else:", f"    {BA.strip()}", "    ba = ba + 1"
    ),
    "calls below with": instead_of(BA, "with self.prefix:", f"    {BA.strip()}"),
    "calls below with, and an end there": instead_of(BA, "with self.prefix:", f"    {BA.strip()}", "    return ba"),
    "a return in a nested function": after(SIZE, "def rest():", "    return num_tokens"),
    "a loop that may return after both calls": after(BA, "for item in ba:", "    return item"),
    "hasattr(self, ...)": after(BA, "if hasattr(self, 'norm'):", "    ba = self.norm"),
    "an early end after both calls": after(BA, "if self.fused_decode:", "    raise ValueError"),
    "annotations and a default": [(FORWARD, "def forward_cuda(self, hidden_states: list, output: list = ()) -> list:")],
    "a helper that knows nothing of the projections": after(BA, "ba = self.split_qkvz(ba)"),
}


@pytest.mark.parametrize("edits", ACCEPTED.values(), ids=ACCEPTED)
def test_what_real_releases_vary_is_accepted(sources: Any, edits: list[tuple[str, str]]) -> None:
    sources.edit(GDN, *edits)
    assert check_contract(sources.package).breaches == ()


BROKEN: dict[str, tuple[list[tuple[str, str]], str]] = {
    # how often the projections are called
    "a second call": (after(BA, "ba, _ = self.in_proj_ba(hidden_states)"), "in_proj_ba(hidden_states) is called 2"),
    "a call too few": ([(QKVZ, "        mixed_qkvz = 1\n")], "in_proj_qkvz(hidden_states) is called 0"),
    "a call in a loop": (instead_of(BA, "for _ in range(2):", f"    {BA.strip()}"), "self.in_proj_ba(hidden_states)"),
    "a call in while": (instead_of(BA, "while not ba:", f"    {BA.strip()}"), "self.in_proj_ba(hidden_states)"),
    "a call in try": (
        instead_of(BA, "try:", f"    {BA.strip()}", "finally:", "    pass"),
        "self.in_proj_ba(hidden_states)",
    ),
    "a call in a lambda": (instead_of(BA, "ba = lambda: self.in_proj_ba(hidden_states)"), "in_proj_ba(hidden_states)"),
    "a call in a nested function": (
        instead_of(BA, "def ba():", "    return self.in_proj_ba(hidden_states)"),
        "self.in_proj_ba(hidden_states)",
    ),
    "a call in a conditional expression": (
        instead_of(BA, "ba, _ = self.in_proj_ba(hidden_states) if num_tokens else (0, 0)"),
        "self.in_proj_ba(hidden_states)",
    ),
    "a call in a list": (
        instead_of(BA, "ba, _ = [self.in_proj_ba(hidden_states) for _ in range(3)][-1]"),
        "self.in_proj_ba(hidden_states) is called 2",
    ),
    "a call in a generator": (instead_of(BA, "ba = max(self.in_proj_ba(hidden_states) for _ in 'ab')"), "is called 2"),
    "a call in an async function": (
        instead_of(BA, "async def ba():", "    return self.in_proj_ba(hidden_states)"),
        "self.in_proj_ba(hidden_states) is called 2",
    ),
    "a call in a class": (instead_of(BA, "class Ba:", f"    {BA.strip()}"), "in_proj_ba(hidden_states) is called 2"),
    "a call in one case": (
        instead_of(BA, "match num_tokens:", "    case 0:", "        pass", "    case _:", f"        {BA.strip()}"),
        "self.in_proj_ba(hidden_states) is called 2",
    ),
    "a call behind or": (instead_of(BA, "ba = mixed_qkvz or self.in_proj_ba(hidden_states)"), "in_proj_ba"),
    "a call in one branch": (instead_of(BA, "if num_tokens:", f"    {BA.strip()}"), "is called 0 or 1 times"),
    "an early return before it": (after(QKVZ, "if not num_tokens:", "    return None"), "in_proj_ba(hidden_states) is"),
    "an early return in try": (
        after(QKVZ, "try:", "    return None", "finally:", "    pass"),
        "in_proj_ba(hidden_states) is called 0 or 1",
    ),
    "an early return in a loop": (after(QKVZ, "for i in 'ab':", "    return i"), "ba(hidden_states) is called 0 or 1"),
    "an early return in while": (after(QKVZ, "while self.prefix:", "    return 1"), "hidden_states) is called 0 or 1"),
    "an early return in a case": (
        after(QKVZ, "match num_tokens:", "    case 0:", "        return None"),
        "in_proj_ba(hidden_states) is called 0 or 1",
    ),
    "an early raise before both": (after(SIZE, "if not num_tokens:", "    raise ValueError"), "in_proj_qkvz(hidden_s"),
    "forward_cpu calls twice": ([(CPU_BA, CPU_BA * 2)], "forward_cpu: self.in_proj_ba(hidden_states) is called 2"),
    # what else is done with them
    "an argument more": ([(BA, "        ba, _ = self.in_proj_ba(hidden_states, None)\n")], "uses in_proj_ba for"),
    "another argument": (after(BA, "self.in_proj_ba(mixed_qkvz)"), "uses in_proj_ba for something other"),
    "a weight is read": (after(BA, "dtype = self.in_proj_ba.weight.dtype"), "uses in_proj_ba for something other"),
    "a projection gets a second name": (after(BA, "project = self.in_proj_qkvz"), "uses in_proj_qkvz for something"),
    "a projection is replaced": (after(SIZE, "self.in_proj_ba = None"), "uses in_proj_ba for something other"),
    "both renamed": ([("in_proj_", "project_")], "self.in_proj_qkvz(hidden_states) is called 0 times"),
    "an in_proj besides": (after(BA, "self.in_proj(hidden_states)"), "uses hidden_states for more than"),
    "a renamed projection": ([("in_proj_ba", "in_proj_gates")], "self.in_proj_ba(hidden_states) is called 0 times"),
    "a helper calls a projection": (
        [(HELPER, f"        self.in_proj_ba(mixed_qkvz)\n{HELPER}")],
        "it calls split_qkvz, which uses the projections itself",
    ),
    "a helper's helper reads a weight": (
        [
            ('return ("stock", core, z)', "return self.rest(core)"),
            ("    def split_qkvz", "    def rest(self, core):\n        self.in_proj_qkvz.weight\n\n    def split_qkvz"),
        ],
        "it calls rest, which uses the projections itself",
    ),
    # what else is done with hidden_states
    "arithmetic": (after(BA, "rest = hidden_states * 2"), "uses hidden_states for more than its size, dtype and dev"),
    "rebinding": (after(SIZE, "hidden_states = num_tokens"), "uses hidden_states for more than"),
    "in-place arithmetic": (after(SIZE, "hidden_states += 1"), "uses hidden_states for more than"),
    "an alias": (after(SIZE, "x = hidden_states"), "uses hidden_states for more than"),
    "given to a helper": (after(BA, "self.split_qkvz(hidden_states)"), "uses hidden_states for more than"),
    "given to a function by name": (after(BA, "print(x=hidden_states)"), "uses hidden_states for more than"),
    "another method": (after(BA, "hidden_states.contiguous()"), "uses hidden_states for more than"),
    "an item": (after(BA, "first = hidden_states[0]"), "uses hidden_states for more than"),
    "closed over": (after(BA, "rest = lambda: hidden_states"), "uses hidden_states for more than"),
    "returned": ([("return self._output_projection([num_t", "return hidden_states, ([num_t")], "uses hidden_states"),
    # what else is done with self: a stand-in for the layer serves nothing but reads
    "super()": (after(BA, "super().forward(ba)"), "uses super for more than reading an attribute"),
    "an attribute is set": (after(BA, "self.warmed_up = True"), "uses self for more than reading an attribute"),
    "an attribute is counted up": (after(BA, "self.calls += 1"), "uses self for more than reading an attribute"),
    "an attribute is deleted": (after(BA, "del self.cache"), "uses self for more than reading an attribute"),
    "self is passed on": (after(BA, "warm_up(self)"), "uses self for more than reading an attribute"),
    "self is passed on by name": (after(BA, "warm_up(layer=self)"), "uses self for more than reading an attribute"),
    "a projection by getattr": (after(BA, "w = getattr(self, 'in_proj_ba').weight"), "uses self for more than"),
    "self gets a second name": (after(BA, "layer = self"), "uses self for more than reading an attribute"),
    # signatures, methods and the class
    **{
        f"forward_cuda is a {name}": ([(FORWARD, f"@{name}\n    {FORWARD}")], "forward_cuda is not one plain method")
        for name in ("torch.compile", "staticmethod", "property")
    },
    "forward_cpu is decorated": ([("def forward_cpu", "@cache\n    def forward_cpu")], "forward_cpu is not one plain"),
    "forward_cuda is bound again": (
        [("    def split_qkvz", "    forward_cuda = ChunkRule.forward_cuda\n\n    def split_qkvz")],
        "forward_cuda is not one plain method",
    ),
    "forward_cuda is bound again in a branch": (
        [("    def split_qkvz", "    if CAPABILITY:\n        from other import forward_cuda\n\n    def split_qkvz")],
        "forward_cuda is not one plain method",
    ),
    "the class is defined again": (
        [("class ChunkRule:", f"class {CLASS}:\n    pass\n\n\nclass ChunkRule:")],
        "there is more than one class",
    ),
    "a further argument": ([(FORWARD, "def forward_cuda(self, hidden_states, output, extra):")], "output, extra)"),
    "a renamed argument": ([(FORWARD, "def forward_cuda(self, x):")], "forward_cuda: its arguments are (self, x)"),
    "a keyword-only argument": ([(FORWARD, "def forward_cuda(self, hidden_states, *, out=None):")], "*, out=None)"),
    "star arguments": ([(FORWARD, "def forward_cuda(self, hidden_states, *args):")], "(self, hidden_states, *args)"),
    "keyword arguments": ([(FORWARD, "def forward_cuda(self, hidden_states, **kw):")], "hidden_states, **kw)"),
    "forward_cuda renamed": ([("forward_cuda(self, hidden", "forward_gpu(self, hidden")], "has no method forward_cuda"),
    "forward_cuda is async": ([(FORWARD, f"async {FORWARD}")], f"{CLASS} has no method forward_cuda"),
    "forward_cuda is not chosen": ([("= self.forward_cuda", "= self.forward_cpu")], "chooses forward_cuda"),
    "the class is renamed": (
        [(f"class {CLASS}", f"class {CLASS}V2")],
        f"there is no class {CLASS} in {GDN}, it may now be {CLASS}V2",
    ),
    "the class is gone": (
        [(f"class {CLASS}", "class Gone"), ("self.in_proj_qkvz", "self.project")],
        f"there is no class {CLASS} in {GDN}; upgrade",
    ),
    "a __new__ of its own": (
        [("    def split_qkvz", "    def __new__(cls):\n        return super().__new__(cls)\n\n    def split_qkvz")],
        f"{CLASS} has a __new__ of its own",
    ),
    "a __new__ that is assigned": (
        [("    def split_qkvz", "    __new__ = ChunkRule.__new__\n\n    def split_qkvz")],
        f"{CLASS} has a __new__ of its own",
    ),
    "not a PluggableLayer": ([("@PluggableLayer.register(", "@CustomOp.register(")], "is not registered as a"),
    "a syntax error": ([("class ChunkRule:", "class ChunkRule")], f"the source of {GDN} cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "named"), BROKEN.values(), ids=BROKEN)
def test_a_change_of_the_layer_is_caught_and_named(sources: Any, edits: list[tuple[str, str]], named: str) -> None:
    sources.edit(GDN, *edits)
    contract = check_contract(sources.package)
    assert not contract.holds
    assert not contract.superseded
    assert contract.reason.startswith("this vLLM is not as the plugin expects it: ")
    assert contract.reason.endswith(ADVICE)
    assert named in contract.reason
    assert "\n" not in contract.reason


HOSTILE = {
    "not UTF-8": b"\xff\xfe\x00",
    "NUL": b"\0",
    "empty": b"",
    "open": b"x = (",
    "coding": b"# coding: nonsense\n",
    "no body": b"class A:\n",
    "many minuses": b"a = " + b"-" * 200_000 + b"1",
    "many brackets": b"(" * 300,
    "many dots": b"a" + b".b" * 100_000,
    "many pluses": b"a = " + b"1+" * 100_000 + b"1",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_no_content_raises(sources: Any, source: bytes) -> None:
    sources.write(GDN, source)
    sources.write("vllm.logger", source)
    contract = check_contract(sources.package)
    assert GDN in contract.reason


def test_a_layer_too_deep_to_be_followed_is_not_as_expected(sources: Any) -> None:
    sources.edit(GDN, *after(BA, f"ba = ba{'.b' * 900}(ba)"))
    assert f"the source of {GDN} cannot be read: RecursionError" in check_contract(sources.package).reason


def test_every_breach_is_named_not_only_the_first(sources: Any) -> None:
    sources.edit(
        GDN, *after(BA, "x = hidden_states"), ("@PluggableLayer.register(", "@register("), (CPU_BA, CPU_BA * 2)
    )
    sources.remove("vllm.envs")
    assert len(check_contract(sources.package).breaches) == 4


def test_no_gdn_module_at_all(sources: Any) -> None:
    sources.remove(GDN)
    contract = check_contract(sources.package)
    assert (contract.module, contract.class_name) == (None, None)
    assert f"the GDN layer has moved: there is neither {GDN} nor {OLD_GDN}" in contract.reason
    assert ADVICE in contract.reason


HELPER_NAMES = [(module, name) for module, names in HELPERS.items() for name in names]


@pytest.mark.parametrize(("module", "name"), HELPER_NAMES, ids=[f"{m}.{n}" for m, n in HELPER_NAMES])
def test_a_missing_helper_is_named(sources: Any, module: str, name: str) -> None:
    last = name.rpartition(".")[2]
    sources.edit(module, (last, f"renamed_{last}"))
    assert check_contract(sources.package).breaches[0] == f"there is no {module}.{name}"


@pytest.mark.parametrize("broken", [None, "def f(:", b"\xff"], ids=["missing", "syntax error", "not UTF-8"])
@pytest.mark.parametrize("module", HELPERS)
def test_a_missing_helper_module_is_named(sources: Any, module: str, broken: str | bytes | None) -> None:
    if broken is None:
        sources.remove(module)
    else:
        sources.write(module, broken)
    assert check_contract(sources.package).breaches == (f"there is no readable module {module}",)


def test_every_name_that_is_imported_from_vllm_is_part_of_the_contract() -> None:
    used = {
        (node.module, alias.name)
        for file in Path(vllm_gdn_plugin.__file__).parent.rglob("*.py")
        if "bench" not in file.parts and file.name != "model.py"  # what check asks, it does without where it fails
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm.")
        for alias in node.names
    }
    others = {
        ("vllm.platforms", "current_platform"),  # made by a module's __getattr__: no source tells that it is there
        ("vllm.utils.import_utils", "import_pynvml"),  # where it is gone, the driver is not told
        ("vllm.model_executor.layers.mamba.mamba_utils", "is_conv_state_dim_first"),  # only asked for the decode kernel
    }
    assert used - others <= {(m, name.partition(".")[0]) for m, name in HELPER_NAMES}
    assert others < used


BINDINGS = {
    "in except": "try:\n    import x\nexcept ImportError:\n    def init_logger(name): pass\n",
    "in else": "try:\n    import x\nexcept ImportError:\n    raise\nelse:\n    def init_logger(name): pass\n",
    "in finally": "try:\n    pass\nfinally:\n    def init_logger(name): pass\n",
    "in with": "with x:\n    def init_logger(name): pass\n",
    "imported": "from other import init_logger\n",
    "imported as": "from other import make as init_logger\n",
    "a module": "import init_logger\n",
    "a chain": "a = init_logger = print\n",
    "a tuple": "(init_logger, b) = 1, 2\n",
    "a starred tuple": "a, (*init_logger, b) = 1, 2\n",
    "annotated": "init_logger: object = print\n",
}


@pytest.mark.parametrize("source", BINDINGS.values(), ids=BINDINGS)
def test_a_helper_may_be_bound_in_any_way(sources: Any, source: str) -> None:
    sources.write("vllm.logger", source)
    assert check_contract(sources.package).breaches == ()


@pytest.mark.parametrize(
    "source", ["from init_logger import x\n", "from x import init_logger as x\n", "def f():\n    init_logger = 1\n"]
)
def test_a_name_that_is_only_mentioned_is_no_helper(sources: Any, source: str) -> None:
    sources.write("vllm.logger", source)
    assert check_contract(sources.package).breaches == ("there is no vllm.logger.init_logger",)


CUSTOM_OP = "vllm.model_executor.custom_op"
NEW = "def __new__(cls, *args, **kwargs):"
LOOKED_UP = "layer_class = op_registry_oot[cls.__name__]"
CONSTRUCTION = {
    "another signature": [(NEW, "def __new__(cls, name, *args):")],
    "another registry": [
        ("if cls.__name__ not in op_registry_oot", "if cls not in other"),
        (LOOKED_UP, "layer_class = 1"),
    ],
    "another name": [
        ("cls.__name__ not", "cls.layer_name not"),
        (LOOKED_UP, "layer_class = op_registry_oot[cls.name]"),
    ],
    "a factory": [("return super().__new__(layer_class)", "return make(layer_class)")],
    "two ways out": [(LOOKED_UP, f"{LOOKED_UP}\n            return layer_class()")],
}


@pytest.mark.parametrize("edits", CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_another_way_of_making_a_layer_is_caught(sources: Any, edits: list[tuple[str, str]]) -> None:
    sources.edit(CUSTOM_OP, *edits)
    (breach,) = check_contract(sources.package).breaches
    assert breach.startswith(f"{CUSTOM_OP}.PluggableLayer.__new__ does not look a layer's class up by its name")


STREAM = "self.stream = aux_stream()"
OWN_STREAM = "with torch.cuda.stream(self.stream):"
IN_PARALLEL = (
    "maybe_execute_in_parallel(lambda: self.in_proj_qkvz(hidden_states), lambda: self.in_proj_ba(hidden_states))"
)
ITSELF: dict[str, list[tuple[str, str]]] = {
    "two streams": [
        (QKVZ, ""),
        *instead_of(
            BA, "mixed_qkvz, ba = maybe_execute_in_parallel(self.in_proj_qkvz, self.in_proj_ba, hidden_states)"
        ),
    ],
    "two streams, by lambdas": [(QKVZ, ""), *instead_of(BA, f"mixed_qkvz, ba = {IN_PARALLEL}")],
    "a stream of its own": instead_of(BA, OWN_STREAM, f"    {BA.strip()}"),
    "a second stream of its own": instead_of(BA, OWN_STREAM, "    pass", OWN_STREAM, f"    {BA.strip()}"),
    "an op of its own": [
        (QKVZ, ""),
        *instead_of(BA, "mixed_qkvz, ba = torch.ops.vllm.gdn_in_proj(hidden_states, self.prefix)"),
    ],
    "a fused projection": [(BA, ""), ("in_proj_qkvz", "in_proj_qkvzba")],
    "one in_proj": [
        (BA, ""),
        (CPU_BA, ""),
        ("[self.in_proj_ba(", "[("),
        ("        self.in_proj_ba = MergedColumnParallelLinear(2)\n", ""),
        ("in_proj_qkvz", "in_proj"),
    ],
    "one in_proj in forward_cuda alone": [(BA, ""), (QKVZ, "        mixed_qkvz, ba = self.in_proj(hidden_states)\n")],
    "one in_proj where a flag asks for it": [
        (QKVZ, ""),
        *instead_of(
            BA,
            "if self.fused_decode:",
            "    mixed_qkvz, ba = self.in_proj(x=hidden_states)",
            "else:",
            f"    {QKVZ.strip()}",
            f"    {BA.strip()}",
        ),
    ],
}


@pytest.mark.parametrize("edits", ITSELF.values(), ids=ITSELF)
def test_where_vllm_runs_them_together_itself_the_plugin_says_so(sources: Any, edits: list[tuple[str, str]]) -> None:
    sources.edit(GDN, *edits)
    contract = check_contract(sources.package)
    assert contract.superseded
    assert not contract.holds
    assert "by itself: the plugin is not needed any more and stands down" in contract.reason


OTHER_OVERLAP = {
    "a stream that is made": [("self.fused_decode = False", STREAM)],
    "a stream for what follows": after(BA, OWN_STREAM, "    query = self.split_qkvz(mixed_qkvz)"),
    "a stream for both": [(QKVZ, f"        {OWN_STREAM}\n    {QKVZ}"), (BA, f"    {BA}")],
    "two streams for what follows": after(
        BA, "maybe_execute_in_parallel(lambda: self.split_qkvz(ba), self.fused_decode)"
    ),
    "in another method": [(HELPER, f"        self.in_proj(mixed_qkvz)\n{HELPER}")],
    "in another class": [("        return q + k", f"        return {IN_PARALLEL}")],
}


@pytest.mark.parametrize("edits", OTHER_OVERLAP.values(), ids=OTHER_OVERLAP)
def test_what_else_vllm_overlaps_does_not_make_the_plugin_needless(sources: Any, edits: list[tuple[str, str]]) -> None:
    """vLLM #50233 wants a second stream in this layer, for another purpose."""
    sources.edit(GDN, *edits)
    assert check_contract(sources.package).holds


@pytest.mark.parametrize(
    "edits", [[], after(BA, "x = hidden_states"), after(BA, STREAM)], ids=["as is", "broken", "own"]
)
def test_a_wheel_gives_what_its_tree_gives(tree: Any, edits: list[tuple[str, str]]) -> None:
    tree.edit(GDN, *edits)
    from_tree = check_contract(tree.package)
    assert check_contract(open_source(str(tree.wheel()))) == from_tree
    assert check_contract(open_source(str(tree.root))) == from_tree
    assert from_tree.holds == (not edits)


def overwrite_the_data(wheel: bytearray) -> None:
    name = b"qwen_gdn_linear_attn.py"
    start = wheel.find(name) + len(name)
    wheel[start : start + 20] = b"x" * 20


def move_the_directory(wheel: bytearray) -> None:
    end = wheel.rfind(b"PK\x05\x06")
    wheel[end + 16 : end + 20] = b"\1\0\0\0"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("damage", [overwrite_the_data, move_the_directory], ids=["its data", "its directory"])
def test_a_damaged_wheel_is_not_as_expected(tree: Any, damage: Any, compression: int) -> None:
    path = tree.wheel(compression)
    wheel = bytearray(path.read_bytes())
    damage(wheel)
    path.write_bytes(wheel)
    assert f"the source of {GDN} cannot be read: " in check_contract(open_source(str(path))).reason
