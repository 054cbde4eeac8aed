"""Which strategy the projections of a GDN layer get, and why: pure functions from facts to a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_gdn_plugin.decide.scratch import UNQUANTIZED, share_no_scratch

FUSED = "fused"
DUAL_STREAM = "dual_stream"
SERIAL = "serial"
AUTO = "auto"

STRATEGIES = (FUSED, DUAL_STREAM, SERIAL)
"""What a layer can be run with."""

REQUESTS = (AUTO, *STRATEGIES)
"""What an operator can ask for."""


@dataclass(frozen=True)
class ProjectionFacts:
    """One projection of a layer, as vLLM built it."""

    linear_method: str
    """Class name of its ``quant_method``: how it multiplies."""
    dtype: str
    """dtype of its parameters, and of its output: ``params_dtype``."""
    output_size: int
    """``output_size_per_partition``: never taken from a weight, which may be packed."""
    plain: bool = True
    """A column-parallel linear layer without bias, gathering or wrapper."""


@dataclass(frozen=True)
class LayerFacts:
    """All that the plan for one GDN layer depends on."""

    platform: str
    qkvz: ProjectionFacts
    ba: ProjectionFacts
    activation_dtype: str
    lora: bool = False
    cuda_graphs: bool = True
    batch_invariant: bool = False
    offload: bool = False
    """Weights are kept on, or fetched from, the CPU: they move while the engine runs."""
    weights_in_place: bool = True
    """Both weights lie on the device that computes, so they can become one storage before they are loaded."""
    ubatching: bool = False
    """vLLM splits a batch in two and runs them in two threads (dual batch overlap)."""
    quantization: str = ""
    """Digest of the checkpoint's quantisation config: with another, a linear method may run other kernels. Only for the
    times; no rule asks for it."""


@dataclass(frozen=True)
class Plan:
    """What is done with a layer, and the reason in one line."""

    strategy: str
    reason: str


Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Rule(Generic[Facts]):
    """A condition on a layer that a strategy, or the decode kernel, needs, as the docs state it."""

    needs: str
    holds: Callable[[Facts], bool]
    otherwise: Callable[[Facts], str]
    """The reason given to the user where the condition does not hold."""


COMMON_RULES: tuple[Rule[LayerFacts], ...] = (
    Rule(
        "no LoRA",
        lambda f: not f.lora,
        lambda f: "LoRA is enabled: it wraps both projections and has a second stream of its own",
    ),
    Rule(
        "both projections are plain linear layers",
        lambda f: f.qkvz.plain and f.ba.plain,
        lambda f: "a projection has a bias, gathers its output, or was replaced by something else",
    ),
    Rule(
        "both give the activations' dtype",
        lambda f: f.qkvz.dtype == f.ba.dtype == f.activation_dtype,
        lambda f: (
            f"in_proj_qkvz gives {f.qkvz.dtype} and in_proj_ba {f.ba.dtype}"
            f" where the activations are {f.activation_dtype}"
        ),
    ),
)

FUSED_RULES: tuple[Rule[LayerFacts], ...] = (
    *COMMON_RULES,
    Rule(
        "both are unquantised",
        lambda f: f.qkvz.linear_method == f.ba.linear_method == UNQUANTIZED,
        lambda f: f"one GEMM cannot serve {f.qkvz.linear_method} and {f.ba.linear_method}",
    ),
    Rule(
        "`VLLM_BATCH_INVARIANT` is off",
        lambda f: not f.batch_invariant,
        lambda f: "VLLM_BATCH_INVARIANT=1 promises bit-equal results, and one GEMM rounds differently from two",
    ),
    Rule(
        "no CPU offload, and the weights lie on the device from the start",
        lambda f: f.weights_in_place and not f.offload,
        lambda f: "the weights are offloaded or not yet in place, so they cannot be one storage",
    ),
)

DUAL_STREAM_RULES: tuple[Rule[LayerFacts], ...] = (
    *COMMON_RULES,
    Rule(
        "`in_proj_ba` is unquantised, and `in_proj_qkvz` shares no scratch memory with it",
        lambda f: share_no_scratch(f.qkvz.linear_method, f.ba.linear_method),
        lambda f: (
            f"{f.qkvz.linear_method} and {f.ba.linear_method} are not known to be safe side by side:"
            " kernels that share scratch memory corrupt each other on two streams"
        ),
    ),
    Rule(
        "CUDA graphs are on (the CPU runs the two one after the other)",
        lambda f: f.cuda_graphs or f.platform != "cuda",
        lambda f: (
            "CUDA graphs are off (enforce_eager, or cudagraph_mode NONE): launching on two streams would cost"
            " more than it hides"
        ),
    ),
    Rule(
        "no CPU offload",
        lambda f: not f.offload,
        lambda f: "weights are offloaded to the CPU, and move while the engine runs",
    ),
    Rule(
        "no dual batch overlap (`--enable-dbo`)",
        lambda f: not f.ubatching,
        lambda f: "dual batch overlap (--enable-dbo) runs the layer in two threads that share the second stream",
    ),
)

RULES: dict[str, tuple[Rule[LayerFacts], ...]] = {FUSED: FUSED_RULES, DUAL_STREAM: DUAL_STREAM_RULES}
"""What each strategy needs, fastest first: ``auto`` takes the first whose rules all hold."""

SERIAL_REASON = "serial was asked for: vLLM runs as it is"


def plan(facts: LayerFacts, request: str) -> Plan:
    """The strategy for one layer.

    ``auto`` takes, on CUDA, fused where its rules hold, else dual_stream where its rules hold, else serial, and stock
    vLLM elsewhere. A strategy asked for by name that a rule forbids becomes serial with the rule's reason.
    """
    if request == SERIAL:
        return Plan(SERIAL, SERIAL_REASON)
    if request == AUTO and facts.platform != "cuda":
        return Plan(SERIAL, nothing_to_gain(facts.platform))
    refusals: list[str] = []
    for strategy, rules in RULES.items():
        if request in (AUTO, strategy):
            refusal = next((rule.otherwise(facts) for rule in rules if not rule.holds(facts)), None)
            if refusal is None:
                return Plan(strategy, "; ".join(refusals) or f"every condition of {strategy} holds")
            if refusal not in refusals:
                refusals.append(refusal)
    return Plan(SERIAL, "; ".join(refusals))


def nothing_to_gain(platform: str) -> str:
    """Why ``auto`` leaves a platform other than CUDA alone."""
    return f"on platform {platform} there is nothing to gain: the plugin speeds up CUDA only"


def platform_plan(platform: str, request: str) -> Plan:
    """The plan as far as platform and request decide it, before any layer is known.

    Serial here means that the host's class is left untouched.
    """
    if request == SERIAL:
        return Plan(SERIAL, SERIAL_REASON)
    if platform not in ("cuda", "cpu") or (request == AUTO and platform != "cuda"):
        return Plan(SERIAL, nothing_to_gain(platform))
    return Plan(request, "decided layer by layer when the model is built")
