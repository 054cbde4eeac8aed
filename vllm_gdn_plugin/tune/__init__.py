"""Timing on the GPU at hand, and what is chosen by it."""
