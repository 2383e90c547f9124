"""Fused building blocks: for each role, how it is recognised, and the forward that serves it."""
