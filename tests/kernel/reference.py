"""A decode step of a GDN layer in float64, and inputs for it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

DIM, TAPS = 128, 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The kernels run in Triton's interpreter, on a CPU."""
DEVICE = "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class Step:
    """What ``decode_kernel.decode`` takes, by the same names."""

    mixed_qkvz: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    conv_state: torch.Tensor
    conv_weight: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    ssm_state: torch.Tensor
    state_indices: torch.Tensor
    norm_weight: torch.Tensor

    def but(self, **changed: Any) -> "Step":
        return replace(self, **changed)


def exact(t: torch.Tensor) -> torch.Tensor:
    return t


def nearest(t: torch.Tensor) -> torch.Tensor:
    """float64 rounded to bfloat16."""
    return t.bfloat16().double()


def toward_zero(t: torch.Tensor) -> torch.Tensor:
    """float64 cut off to bfloat16, as Triton's interpreter does it."""
    return (t.float().view(torch.int32) & -0x10000).view(torch.float32).double()


def reference(
    step: Step, tokens: list[int], *, eps: float, gate: str, bf16: Callable[[torch.Tensor], torch.Tensor] = exact
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step of these tokens in float64: output (tokens, HV, 128), conv state (tokens, 3, qkv) and recurrent state
    (tokens, HV, 128, 128) after it.

    ``bf16`` rounds, or does not, what vLLM rounds to bfloat16 on the way.
    """
    slots, x = step.state_indices[tokens].long(), step.mixed_qkvz[tokens].double()
    b, a, ssm = step.b[tokens].double(), step.a[tokens].double(), step.ssm_state[slots].double()
    heads, qkv = b.shape[1], step.conv_weight.shape[0]
    window = torch.cat([step.conv_state[slots, : TAPS - 1].double(), x[:, None, :qkv]], 1)
    products = window * step.conv_weight.t().double()
    y = (bf16(products) if step.conv_weight.dtype == torch.bfloat16 else products).sum(1)
    y = bf16(y * y.sigmoid()).view(len(tokens), -1, DIM)
    q, k, v = y.split([(y.shape[1] - heads) // 2] * 2 + [heads], 1)
    q, k = (t / (t.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = (t.repeat_interleave(heads // t.shape[1], 1) for t in (q * DIM**-0.5, k))
    decay = torch.exp(-step.A_log.double().exp() * torch.nn.functional.softplus(a + step.dt_bias.double()))
    ssm = ssm * decay[..., None, None]
    ssm = ssm + ((v - (ssm @ k[..., None])[..., 0]) * b.sigmoid()[..., None])[..., None] * k[..., None, :]
    o = bf16((ssm @ q[..., None])[..., 0])
    o = o * (o.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * step.norm_weight.double()
    z = x[:, qkv:].view(o.shape)
    return o * (z.sigmoid() if gate == "sigmoid" else z * z.sigmoid()), window[:, 1:], ssm


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    """The norm of the difference as a part of the norm."""
    return float((got.double() - true).norm() / true.norm())


def make_step(
    key_heads: int,
    value_heads: int,
    state_indices: list[int],
    *,
    slots: int,
    device: str = "cpu",
    state_dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int = 0,
) -> Step:
    """Random inputs, states that have seen some tokens. ``padding``: numbers between rows and between slots."""
    generator = torch.Generator().manual_seed(seed)
    qkv, values, tokens = (2 * key_heads + value_heads) * DIM, value_heads * DIM, len(state_indices)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(device)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers; those between its rows are NaN, so that a read of them shows."""
        size = tensor[0].numel()
        room = torch.full((len(tensor), size + padding), torch.nan, dtype=tensor.dtype, device=device)
        room[:, :size] = tensor.flatten(1)
        return room[:, :size].view(tensor.shape)

    projected = padded(normal(tokens, qkv + values + 2 * value_heads).bfloat16())
    return Step(
        mixed_qkvz=projected[:, : qkv + values],
        b=projected[:, qkv + values : qkv + values + value_heads],
        a=projected[:, qkv + values + value_heads :],
        conv_state=padded(normal(slots, TAPS - 1, qkv).bfloat16()),
        conv_weight=normal(qkv, TAPS, spread=0.5).to(parameter_dtype),
        A_log=normal(value_heads),
        dt_bias=normal(value_heads).to(parameter_dtype),
        ssm_state=padded(normal(slots, value_heads, DIM, DIM, spread=0.1).to(state_dtype)),
        state_indices=torch.tensor(state_indices, dtype=torch.int32, device=device),
        norm_weight=(1 + normal(DIM, spread=0.1)).to(parameter_dtype),
    )
