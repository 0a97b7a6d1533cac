# What the core uses of amaranth, which has no types of its own that pyright can follow.
