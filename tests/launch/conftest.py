"""The trainer's small recipe, and what every test of a real launcher waits for."""

from tests.trainer.conftest import data as data
from tests.trainer.conftest import recipe as recipe
