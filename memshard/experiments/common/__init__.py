"""What all experiments share: the catalogue, running, training, clocks, tables and pictures."""
