"""Parts that all experiments share: catalogue, running, training, clocks, tables and pictures."""
