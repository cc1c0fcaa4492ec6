"""The addresses of a layer's table."""

from memshard.models.load_class import load_class
from memshard.models.ngram.addresses import Addresses
from memshard.models.ngram.kinds import RULES, NgramConfig

_MOST_IDS = 1 << 29


def build_addresses(settings: NgramConfig, token_ids: int, layer: int) -> Addresses:
    """Return the addresses of a layer's table by the settings' rule. token_ids: number of ids that
    n-grams are made of. ValueError for numbers that the rule's arithmetic cannot hold.
    """
    if not 1 <= token_ids <= _MOST_IDS:
        raise ValueError(
            f"model.ngram.token_ids is {token_ids}; it must be from 1 to {_MOST_IDS:,}"
        )
    addresses: Addresses = load_class(RULES[settings.rule].path)(settings, token_ids, layer)
    return addresses
