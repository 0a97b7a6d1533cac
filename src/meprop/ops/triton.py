"""The place for GPU kernels. There are none yet."""

from __future__ import annotations

from meprop.ops.registry import Backend, register

backend = Backend(
    "triton", missing="meprop has no Triton kernels yet: CUDA tensors are served by plain torch operations"
)
register(backend)
