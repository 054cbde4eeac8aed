"""``python -m vllm_gdn_plugin``: the command line."""

from vllm_gdn_plugin.cli import main

raise SystemExit(main())
