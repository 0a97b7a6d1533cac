"""Measuring speed: against today's dense PyTorch, in one process, interleaved."""
