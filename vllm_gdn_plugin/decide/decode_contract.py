"""What the decode kernel relies on in vLLM's Gated Delta Net layer, checked on vLLM's source text.

On its own: where it does not hold, vLLM decodes as it is, and the projections are still taken.
"""

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_gdn_plugin.decide.contract import GDN_CLASSES, UNREADABLE, layer_module, missing_helpers, parse

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

FLAGS = ("fused_gdn_decode", "fused_gdn_spec_decode")
"""By which ``forward_cuda`` takes its packed branch: 0.28 to 0.31, and 0.32 and later."""

PACKED_OP = "qwen_gdn_attention_core_fused_norm_packed"
PACKED_CORE = "_forward_core_fused_norm_packed"
DECODE = "_forward_core_decode_non_spec"
REORDER = "fix_query_key_value_ordering"

FORWARD = f"""
num_tokens = hidden_states.size(0)
mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
ba, _ = self.in_proj_ba(hidden_states)
use_FLAG = (
    self.enable_FLAG
    and hidden_states.dtype == torch.bfloat16
    and self.norm.weight.dtype in (torch.bfloat16, torch.float32)
)
if use_FLAG:
    core_attn_out = torch.zeros(
        (num_tokens, self.num_v_heads // self.tp_size, self.head_v_dim),
        dtype=hidden_states.dtype,
        device=hidden_states.device,
    )
    torch.ops.vllm.{PACKED_OP}(mixed_qkvz, ba, core_attn_out, layer_name=_encode_layer_name(self.prefix))
    output, _ = self.out_proj(core_attn_out.flatten(-2))
    return output
"""
"""How ``forward_cuda`` begins, with one of the flags; ``run.decode.forward_packed`` takes the place of this branch."""

SIGNATURES = {
    "forward_cuda": ["self", "hidden_states"],
    PACKED_CORE: ["self", "mixed_qkvz", "ba", "core_attn_out"],
    "_forward_core": ["self", "mixed_qkv", "b", "a", "core_attn_out"],
    DECODE: ["self", "mixed_qkv", "b", "a", "core_attn_out", "attn_metadata"],
    "_rms_norm_gated_cuda": ["self", "x", "output_gate", "out"],
    "split_ba": ["self", "ba"],
    REORDER: ["self", "mixed_qkvz", "mixed_ba"],
}

KERNELS = ("causal_conv1d_update", "fused_recurrent_gated_delta_rule_packed_decode")
"""What vLLM decodes with, one after the other."""

NO_PREFILLS = "attn_metadata.num_prefills == 0"
PURE_DECODE = {"attn_metadata.spec_sequence_masks is None", NO_PREFILLS, "attn_metadata.num_decodes > 0"}
NO_METADATA = ("attn_metadata is None", "attn_metadata_raw is None")
TOKENS, MASKS = "num_actual_tokens", "spec_sequence_masks"
EVERY_ROW = f"core_attn_out[:{TOKENS}] = core_attn_out_non_spec.squeeze(0)"
"""How ``_forward_core`` ends where nothing is speculated."""

HELPERS = {
    "vllm.forward_context": ("ForwardContext.attn_metadata", "ForwardContext.cudagraph_runtime_mode"),
    "vllm.model_executor.layers.mamba.mamba_utils": ("is_conv_state_dim_first",),
}
"""What the kernel's side calls in vLLM, besides the layer and what the projections call."""

OPS = "vllm.third_party.flash_linear_attention.ops"
TAKE_COLUMNS = {
    "fused_post_conv_prep": (f"{OPS}.fused_gdn_prefill_post_conv", "stride(0)"),
    "fused_sigmoid_gating_delta_rule_update": (f"{OPS}.fused_sigmoid_gating", "contiguous()"),
    "fused_recurrent_gated_delta_rule_packed_decode": (f"{OPS}.fused_recurrent", "stride(0)"),
}
"""All that ``_forward_core`` may hand b and a to: they are columns of one tensor here, and what shows that it may."""

METADATA = ("spec_sequence_masks", "num_prefills", "num_decodes", "num_actual_tokens", "non_spec_state_indices_tensor")
METADATA_MODULE = "vllm.v1.attention.backends.gdn_attn"


def why_no_decode_kernel(package: "Traversable") -> str | None:
    """The first point that does not hold in the sources of the package ``vllm``, or None."""
    module = layer_module(package)
    if module is None:
        return "the GDN layer has moved"
    try:
        tree = parse(package, module)
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == GDN_CLASSES[module]]
        if len(classes) != 1:
            return f"there is not one class {GDN_CLASSES[module]}"
        breach = next(_breaches(classes[0], tree, parse(package, METADATA_MODULE)), None)
        return breach or next(missing_helpers(package, HELPERS), None) or next(_need_copies(package), None)
    except UNREADABLE as error:
        return f"the source of {module} or of what it calls cannot be read: {type(error).__name__}"


def _breaches(layer: ast.ClassDef, module: ast.Module, metadata: ast.Module) -> Iterator[str]:
    methods = {n.name: n for n in layer.body if isinstance(n, ast.FunctionDef)}
    if PACKED_CORE not in methods:
        yield "this vLLM has no packed branch for it, which came with 0.28"
        return
    for name, expected in SIGNATURES.items():
        if name not in methods or [a.arg for a in methods[name].args.args] != expected:
            yield f"{name} is not a method of {', '.join(expected)}"
            return
    if ast.unparse(methods[REORDER].body[-1]) != "return (query, key, value, z, b, a)":
        yield f"{REORDER} does not give q, k, v, z, b and a"
    if not _writes_every_row(methods["_forward_core"]):
        yield "_forward_core does not write every row of a batch with prefills"
    if not _takes_packed_branch(methods["forward_cuda"]):
        yield f"forward_cuda does not begin with a branch of {' or '.join(FLAGS)} that runs {PACKED_OP}, then out_proj"
    ops = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == PACKED_OP]
    if len(ops) != 1 or _calls(ops[0], PACKED_CORE) != 1:
        yield f"{PACKED_OP} does not call {PACKED_CORE} once"
    if not _decodes_by(methods["_forward_core"]):
        yield f"_forward_core does not hand a pure decode to {DECODE}"
    decode = methods[DECODE]
    if any(_calls(decode, kernel) != 1 for kernel in KERNELS):
        yield f"{DECODE} does not call {' and '.join(KERNELS)} once each"
    if "self.kv_cache" not in ast.unparse(decode) or "transpose(-1, -2)" not in ast.unparse(decode):
        yield f"{DECODE} does not find conv state and recurrent state in kv_cache as expected"
    for name in ("_forward_core", DECODE):
        if others := set(_takers(methods[name])) - {*TAKE_COLUMNS, DECODE}:
            yield f"{name} hands b or a to {', '.join(sorted(others))}"
    fields = {ast.unparse(n.target) for n in ast.walk(metadata) if isinstance(n, ast.AnnAssign)}
    yield from (f"GDNAttentionMetadata has no {name}" for name in METADATA if name not in fields)


def _need_copies(package: "Traversable") -> Iterator[str]:
    for name, (module, shown) in TAKE_COLUMNS.items():
        found = [n for n in parse(package, module).body if isinstance(n, ast.FunctionDef) and n.name == name]
        calls = {ast.unparse(n) for one in found for n in ast.walk(one) if isinstance(n, ast.Call)}
        if not {f"a.{shown}", f"b.{shown}"} <= calls:
            yield f"{name} may not take b and a with rows of any stride"


def _takers(method: ast.FunctionDef) -> Iterator[str]:
    """What is called with b or a, or with rows of them."""
    parts, known = {"a", "b"}, 0
    while known < len(parts):
        known = len(parts)
        for n in ast.walk(method):
            if isinstance(n, ast.Assign) and _whose(n.value) in parts:
                parts |= {target.id for target in n.targets if isinstance(target, ast.Name)}
    for n in ast.walk(method):
        if isinstance(n, ast.Call) and any(_whose(one) in parts for one in (*n.args, *(k.value for k in n.keywords))):
            yield ast.unparse(n.func).rpartition(".")[2]


def _whose(value: ast.expr) -> str | None:
    """The tensor that this is rows of, by name."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "index_select":
        value = value.func.value
    while isinstance(value, ast.Subscript):
        value = value.value
    return value.id if isinstance(value, ast.Name) else None


def _takes_packed_branch(forward: ast.FunctionDef) -> bool:
    body = forward.body[ast.get_docstring(forward) is not None :]
    expected = [ast.parse(FORWARD.replace("FLAG", flag)).body for flag in FLAGS]
    return any([*map(ast.dump, body[: len(one)])] == [*map(ast.dump, one)] for one in expected)


def _decodes_by(core: ast.FunctionDef) -> bool:
    for branch in (n for n in core.body if isinstance(n, ast.If)):
        if {*_all_of(branch.test)} >= PURE_DECODE:
            returns = [n for n in branch.body if isinstance(n, ast.Return) and n.value is not None]
            return len(branch.body) == len(returns) == 1 and _calls(returns[0], DECODE) == 1
    return False


def _writes_every_row(core: ast.FunctionDef) -> bool:
    """Of a batch with prefills and without speculation."""
    early = {id(n) for n in ast.walk(core) if isinstance(n, ast.Return)}
    for branch in (n for n in core.body if isinstance(n, ast.If)):
        if NO_PREFILLS in _all_of(branch.test) or ast.unparse(branch.test) in NO_METADATA:
            early -= {id(n) for statement in branch.body for n in ast.walk(statement)}
    stores = [n for n in ast.walk(core) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    set_once = [[n.id for n in stores].count(name) for name in (TOKENS, MASKS)] == [1, 1]
    known = {ast.unparse(n) for n in core.body if isinstance(n, ast.Assign)}
    taken = {f"{name} = attn_metadata.{name}" for name in (TOKENS, MASKS)} <= known
    end: list[ast.stmt] = core.body[-1:]
    while len(end) == 1 and isinstance(end[0], ast.If) and f"{MASKS} is not None" in _all_of(end[0].test):
        end = end[0].orelse
    written = [ast.unparse(n) for n in end] == [EVERY_ROW]
    return written and not early and set_once and taken and "core_attn_out" not in {n.id for n in stores}


def _all_of(test: ast.expr) -> list[str]:
    """What must hold, all of it, for a test to hold."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return [ast.unparse(part) for part in parts]


def _calls(code: ast.AST, name: str) -> int:
    return sum(isinstance(n, ast.Call) and ast.unparse(n.func).rpartition(".")[2] == name for n in ast.walk(code))
