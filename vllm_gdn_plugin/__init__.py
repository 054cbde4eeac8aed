"""Speeds up Gated Delta Net (GDN) layers in vLLM: their input projections, and their decode.

vLLM loads :func:`register` through the entry point ``vllm_gdn_plugin`` of the group
``vllm.general_plugins``. Importing this package imports neither vLLM nor torch.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "register"]

from vllm_gdn_plugin.install import register
