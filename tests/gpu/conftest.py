"""The data and the recipe of the trainer's tests."""

from tests.trainer.conftest import data, recipe

__all__ = ["data", "recipe"]
