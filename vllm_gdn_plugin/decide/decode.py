"""Whether a GDN layer's decode runs in the plugin's kernel, and why not: pure functions of facts."""

from dataclasses import dataclass

from vllm_gdn_plugin.decide.decode_contract import PACKED_OP
from vllm_gdn_plugin.decide.plan import Rule

HEAD_DIM = 128
"""Keys and values of a head, the only size that the kernel is made for."""

CONV_WIDTH = 4
"""Taps of conv1d; its state is the last three of its inputs."""


@dataclass(frozen=True)
class DecodeFacts:
    """All that the decode kernel of one layer depends on, besides vLLM's source."""

    platform: str
    interleaved: bool = False
    """The projections' output has q, k, v and z, and b and a, of each key head in turn (Qwen3-Next)."""
    head_dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM)
    """Keys and values of a head."""
    conv: tuple[int, bool, str] = (CONV_WIDTH, False, "silu")
    """Width of conv1d, whether it has a bias, and its activation."""
    gate: str = "silu"
    """Activation of the gate in the norm."""
    norm: tuple[object, bool] = (None, True)
    """Group size of the norm, and whether it comes before the gate."""
    dtypes: tuple[str, ...] = ("bfloat16", "bfloat16", "float32", "bfloat16")
    """Of the activations, the conv state, the recurrent state and the norm's weight."""
    conv_state_dim_first: bool = False
    lora: bool = False
    batch_invariant: bool = False
    speculation: bool = False
    offload: bool = False
    """Weights are kept on, or fetched from, the CPU."""
    ubatching: bool = False
    breakable_graphs: bool = False
    piecewise_decode: bool = False
    """vLLM replays decodes in piecewise CUDA graphs (cudagraph_mode PIECEWISE), which hold no attention."""
    core_within_graph: bool = False
    """The operator's own `splitting_ops` split the compiled graph, but not at the op that the kernel is in."""
    turned_off: str = ""
    """vLLM's own setting by which the operator has chosen another decode."""


FLOATS = ("bfloat16", "float32")

DECODE_RULES: tuple[Rule[DecodeFacts], ...] = (
    Rule("CUDA", lambda f: f.platform == "cuda", lambda f: f"it is made for CUDA, this is platform {f.platform}"),
    Rule("no LoRA", lambda f: not f.lora, lambda f: "LoRA is enabled"),
    Rule(
        "`VLLM_BATCH_INVARIANT` is off",
        lambda f: not f.batch_invariant,
        lambda f: "VLLM_BATCH_INVARIANT=1 promises vLLM's own bits",
    ),
    Rule("no CPU offload", lambda f: not f.offload, lambda f: "weights are offloaded to the CPU"),
    Rule(
        "no speculative decoding",
        lambda f: not f.speculation,
        lambda f: "with speculative decoding vLLM has a kernel of its own",
    ),
    Rule(
        "no dual batch overlap, no breakable CUDA graphs",
        lambda f: not f.ubatching and not f.breakable_graphs,
        lambda f: f"{'dual batch overlap' if f.ubatching else 'breakable CUDA graphs'} split a step in parts",
    ),
    Rule(
        "CUDA graphs of whole decode steps, or none",
        lambda f: not f.piecewise_decode,
        lambda f: "cudagraph_mode PIECEWISE leaves the attention out of its graphs",
    ),
    Rule(
        "the compiled graph is split at the attention, as vLLM does it by itself",
        lambda f: not f.core_within_graph,
        lambda f: f"splitting_ops leave out vllm::{PACKED_OP}; add it, or leave them to vLLM",
    ),
    Rule(
        "vLLM's own decode is not chosen by `VLLM_GDN_DECODE_KERNEL` or `VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE`",
        lambda f: not f.turned_off,
        lambda f: f"{f.turned_off} asks for vLLM's own",
    ),
    Rule(
        f"heads of {HEAD_DIM} keys and {HEAD_DIM} values, conv1d of width {CONV_WIDTH} without bias",
        lambda f: f.head_dims == (HEAD_DIM, HEAD_DIM) and f.conv == (CONV_WIDTH, False, "silu"),
        lambda f: f"heads are of {f.head_dims[0]} keys and {f.head_dims[1]} values, conv1d is {f.conv}",
    ),
    Rule(
        "a norm of whole heads before a SiLU or sigmoid gate",
        lambda f: f.norm == (None, True) and f.gate in ("silu", "sigmoid"),
        lambda f: f"the norm is another: group size {f.norm[0]}, before the gate: {f.norm[1]}, gate {f.gate}",
    ),
    Rule(
        "activations and conv state in bfloat16, recurrent state and norm in bfloat16 or float32",
        lambda f: f.dtypes[:2] == ("bfloat16", "bfloat16") and {*f.dtypes[2:]} <= {*FLOATS},
        lambda f: "activations, conv state, recurrent state and norm are in " + ", ".join(f.dtypes),
    ),
    Rule(
        "vLLM's default layout of the conv state",
        lambda f: not f.conv_state_dim_first,
        lambda f: "the conv state lies with its channels first",
    ),
)


def why_no_kernel(facts: DecodeFacts, request: str, strategy: str) -> str | None:
    """Why a layer's decode is left to vLLM, or None where the kernel may run.

    Args:
        request: ``VLLM_GDN_PLUGIN_DECODE_KERNEL``: auto, 0 or 1.
        strategy: ``VLLM_GDN_PLUGIN_STRATEGY``; serial turns the kernel off unless it is asked for by 1.
    """
    if request == "0":
        return "VLLM_GDN_PLUGIN_DECODE_KERNEL=0"
    if request == "auto" and strategy == "serial":
        return "VLLM_GDN_PLUGIN_STRATEGY=serial turns it off, too"
    return next((rule.otherwise(facts) for rule in DECODE_RULES if not rule.holds(facts)), None)
