# What a user of the library imports from `memshard`: the one list. Type checkers read this file,
# `__init__.py` reads it when memshard is imported. docs/api.md has a sentence on each name.
from memshard.models.config import MemoryConfig as MemoryConfig
from memshard.models.config import ModelConfig as ModelConfig
from memshard.models.decode.generate import generate as generate
from memshard.models.memory.peer import Peer as Peer
from memshard.models.memory.product_key import ProductKeyMemory as ProductKeyMemory
from memshard.models.memory.slot_usage import UsageReport as UsageReport
from memshard.models.memory.table import ValueTable as ValueTable
from memshard.models.memory.table import count_parameters as count_parameters
from memshard.models.memory.table import externalize_tables as externalize_tables
from memshard.models.memory.table import find_tables as find_tables
from memshard.models.transformer import Transformer as Transformer
from memshard.parallel.tables.full_state import full_state_dict as full_state_dict
from memshard.parallel.tables.full_state import load_full_state_dict as load_full_state_dict
from memshard.parallel.tables.shard_tables import shard_tables as shard_tables
from memshard.trainer.checkpoint.load_model import LoadedModel as LoadedModel
from memshard.trainer.checkpoint.load_model import load_model as load_model
from memshard.trainer.checkpoint.save_load import DamagedCheckpoint as DamagedCheckpoint
from memshard.trainer.config.load import RecipeError as RecipeError
from memshard.trainer.config.load import load_recipe as load_recipe
from memshard.trainer.config.optimizers import OptimizerConfig as OptimizerConfig
from memshard.trainer.config.optimizers import TableOptimizerConfig as TableOptimizerConfig
from memshard.trainer.config.training import TrainConfig as TrainConfig
from memshard.trainer.evaluation.slot_usage import slot_usage as slot_usage
from memshard.trainer.export.foreign import load_memory as load_memory
from memshard.trainer.loop import train as train
from memshard.trainer.optim.average import AveragedModel as AveragedModel
from memshard.trainer.optim.combined import CombinedOptimizer as CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam as RowAdam
from memshard.trainer.set_up import set_up as set_up
from memshard.trainer.training import StepOutcome as StepOutcome
from memshard.trainer.training import Training as Training
from memshard.trainer.training import build_for_training as build_for_training
from memshard.trainer.training import training_step as training_step

__version__: str
