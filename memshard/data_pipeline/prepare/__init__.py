"""From text to a data folder."""
