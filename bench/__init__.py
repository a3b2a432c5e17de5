"""Benchmarks: fused against eager against torch.compile."""
