"""Buckets of locality-sensitive hashing."""

import torch

from memshard.models.lsh.hashing import factorise, hash_buckets
from memshard.models.mixers.kinds import bucket_count


def test_buckets_depend_on_seed_head_and_round_alone() -> None:
    x = torch.randn(3, 5, 7, 16)
    buckets = hash_buckets(x, 6, rounds=4, seed=1)
    assert buckets.shape == (3, 4, 5, 7) and int(buckets.min()) >= 0 and int(buckets.max()) < 6
    assert torch.equal(buckets[:2, :, 3], hash_buckets(x[:2, 3:4], 6, 4, 1)[:, :, 0])
    assert not torch.equal(buckets, hash_buckets(x, 6, 4, 2))


def test_near_vectors_share_a_bucket_more_often_than_far_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2000, 32)
    near, far = x + 0.2 * torch.randn_like(x), torch.randn_like(x)
    buckets, near_buckets, far_buckets = (hash_buckets(y, 16, 4, 0) for y in (x, near, far))
    assert (
        (buckets == near_buckets).float().mean()
        > 0.7
        > 0.1
        > (buckets == far_buckets).float().mean()
    )


def test_many_buckets_are_found_in_factors_of_few_directions() -> None:
    factors = factorise(8192)
    assert all(factor % 2 == 0 and factor <= 128 for factor in factors)
    product = torch.tensor(factors).prod()
    buckets = hash_buckets(torch.randn(1, 20_000, 32), 8192, 1, 0)
    assert (
        8192 <= product < 3 * 8192 and int(buckets.max()) < product and len(buckets.unique()) > 4000
    )


def test_short_sequences_are_one_bucket() -> None:
    assert [bucket_count(length, 64) for length in (1, 64, 128, 129, 256, 257, 1 << 20)] == [
        1,
        1,
        1,
        2,
        2,
        4,
        8192,
    ]
