"""On chip: layer-multiplexed back-propagation in fixed point, with top-k.

`design` says what is trained, `model` trains it bit for bit as the core does, `cost` counts cycles, and `core` is the
hardware. `explore`, `verify` and `yosys` are what the command line calls. Only `core` and what uses it need amaranth.
"""
