"""The duplication task is copied by full attention and by many rounds of LSH."""

import torch


def test_the_duplication_task_and_its_attentions() -> None:
    """Full attention learns a short copy in seconds; trained with it, many rounds of LSH
    still do it.
    """
    from memshard.experiments.reformer.duplication import sample_copies
    from memshard.experiments.reformer.duplication import train as train_copy

    tokens = sample_copies(5, 3, torch.Generator())
    assert (
        tokens.shape == (3, 12)
        and torch.equal(tokens[:, :6], tokens[:, 6:])
        and not tokens[:, 0].any()
        and tokens[:, 1:6].all()
    )
    point = {
        "attention": "full",
        "lr": 3e-3,
        "seed": 1,
        "words": 3,
        "chunk": 2,
        "dim": 64,
        "heads": 2,
        "batch": 64,
        "steps": 400,
    }
    result = train_copy(point)
    assert result["full"] > 30 > 100 / 127 * 5
