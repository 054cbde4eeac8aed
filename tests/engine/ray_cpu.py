"""Generate with the Ray executor on one machine without a GPU, where vLLM 0.32 by itself does not support it.

    python ray_cpu.py MODEL OUTPUT.json [the options of generate.py]

vLLM's CPU platform names no resource for Ray ("current platform cpu does not support ray"). As a platform plugin of
vLLM this module adds one, a GPU as Ray counts them, and starts Ray with as many as are asked for. Ray starts without
the plugin's settings, as on another machine: what the workers read, vLLM has copied.
"""

from __future__ import annotations

import os
from typing import Any


def platform() -> str:
    return "ray_cpu.RayCpuPlatform"


def __getattr__(name: str) -> Any:
    """The platform's class: made when vLLM asks for it, because vLLM cannot be imported while it loads its plugins."""
    if name != "RayCpuPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    return type(name, (CpuPlatform,), {"ray_device_key": "GPU"})


def main() -> None:
    import generate
    import ray

    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("VLLM_GDN_PLUGIN_")}
    ray.init(num_gpus=generate.arguments().tensor_parallel_size, include_dashboard=False)
    os.environ.update(settings)
    generate.main()


if __name__ == "__main__":
    main()
