"""Product keys against rows that are addressed by n-grams, at equally many table values."""

from memshard.experiments.pkm.studies import NO_MEMORY, Model, Size, study, variant


def _models(size: Size) -> dict[str, Model]:
    """Return the models. Rows that a token reads are as wide together as one of product keys, and
    each read has a part of its own of as many rows, so that tables have as many values.
    """
    every_layer = f"model.ngram.layers={list(range(size.layers))}"
    rows = f"model.ngram.rows={size.slots}"
    return {
        "none": variant(NO_MEMORY),
        "product keys": variant(),
        "Memory+": variant("model.memory.gate=true"),
        "PEER": variant("model.memory.kind=peer", *size.peer),
        "bigram": variant(
            NO_MEMORY,
            every_layer,
            rows,
            "model.ngram.rule=bigram",
            "model.ngram.share=true",
            "model.ngram.gate=scalar",
            "model.ngram.convolution=0",
        ),
        "LongCat": variant(
            NO_MEMORY,
            "model.ngram.layers=[0]",
            rows,
            "model.ngram.rule=longcat",
            "model.ngram.place=embedding",
            "model.ngram.gate=none",
        ),
        "Engram": variant(NO_MEMORY, "model.ngram.layers=[1]", rows),
        # Of as many values as the vocabulary gives: fewer than the others.
        "value embeddings": variant(
            NO_MEMORY,
            every_layer,
            "model.ngram.rule=token",
            "model.ngram.place=values",
            "model.ngram.gate=heads",
        ),
        # Half of the values each; PEER's keys make half as many slots.
        "product keys and Engram": variant(
            size.peer[0], "model.ngram.layers=[1]", f"model.ngram.rows={size.slots // 2}"
        ),
    }


EXPERIMENT = study(
    "alternatives",
    "memories by product keys and by n-grams, of equally many values",
    _models,
    2.5,
    headline=True,
)
