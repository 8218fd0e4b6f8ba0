"""From shard folders to batches: order and random numbers are pure functions, kernels only apply them."""
