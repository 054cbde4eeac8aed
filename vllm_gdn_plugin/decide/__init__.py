"""What is decided, and why: pure functions from facts to a plan, without vLLM."""
