"""The command ``vllm-gdn-plugin``."""
