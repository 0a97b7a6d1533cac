"""On chip: layer-multiplexed back-propagation in fixed point, with top-k."""
