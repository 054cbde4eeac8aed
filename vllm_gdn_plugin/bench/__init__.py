"""``vllm-gdn-plugin bench``: times the two input projections of a GDN layer, alone, in each strategy.

Importing this package imports nothing else; what it measures with comes with the extra ``bench``.
"""
