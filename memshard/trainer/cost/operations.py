"""Count the arithmetic operations of a token, in closed form."""

from memshard.models.config import ModelConfig
from memshard.models.mixers.kinds import LayerSize
from memshard.trainer.cost.parameters import count_parameters


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Return the operations of forward and backward for one token.

    6 for each parameter that it multiplies, sub-keys included; 6 for each multiplication between
    tokens in a mixer (length dim a layer for causal attention); 6 heads topk value_dim for each
    table of a product-key memory, for sums and their gradients, and nothing for rows of n-grams,
    which are read as they are. Recomputation, norms and updates do not count.
    `vocab_size` must be set, and `max_length` for learned positions.
    """
    size = LayerSize(config.mixer, config.dim, length)
    mixers = sum(
        config.mixer.kind_of(layer).multiplications(size) for layer in range(config.layers)
    )
    lookup = sum(
        group.lookups * group.reads * group.value_dim
        for group in config.table_groups
        if group.summed
    )
    # A token of a pair passes either the encoder or the decoder: about half of the model.
    return (3.0 if config.translates else 6.0) * (count_parameters(config).active + mixers + lookup)
