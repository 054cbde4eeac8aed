"""``python -m vllm_gdn_plugin``: the command line."""

from vllm_gdn_plugin.cli.main import main

raise SystemExit(main())
