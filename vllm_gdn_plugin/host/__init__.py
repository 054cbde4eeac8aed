"""What is asked of vLLM, and where the plugin takes part in it. All imports vLLM when it is called, never before."""
