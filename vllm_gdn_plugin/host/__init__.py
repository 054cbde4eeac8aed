"""The only place that knows vLLM's names. Everything here imports vLLM when it is called, never before."""
