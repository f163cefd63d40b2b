"""openpi: codecs, statistics, training."""
