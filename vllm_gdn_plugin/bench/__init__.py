"""``vllm-gdn-plugin bench``: times a GDN layer, its projections, an engine and its start-up, beside stock vLLM.

Importing this package imports nothing else; what it measures with comes with the extra ``bench``.
"""
