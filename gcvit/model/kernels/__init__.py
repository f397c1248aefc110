"""Kernels written in Triton. Nothing here is loaded before it is used: the model runs without Triton."""
