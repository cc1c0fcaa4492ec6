"""The search itself: births, workers, hurdles, a journal that survives kills, and the report."""
