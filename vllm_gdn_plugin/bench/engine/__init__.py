"""``bench serve`` and ``bench compile``: whole engines, with the plugin and without it, in turn."""
