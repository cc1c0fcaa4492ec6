"""Memories whose rows are chosen by the last tokens' ids: n-gram tables."""
