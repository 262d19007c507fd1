"""Predicted times of the CUDA kernels on an H100, from their machine code; nothing here is measured."""
