"""From files to batches.

prepare/, once: `memshard data build`

    files, URLs      inputs/files.py      which files, and which source reads each
      |              inputs/*.py, web/    a file to documents (inputs/kinds.py lists sources)
    documents        documents.py         filtered by language and quality, with signatures
      |              split.py             duplicates out; train, held-out or test by hash
      |              sample.py            lines for the tokenizer -> tokenizer.py
    token shards     write_shards.py      tokens in WebDataset tars
      |              pipeline.py          runs these stages, each of which can be resumed
      v
format/: index.json, tars of tokens, sidecars of offsets

stream/, in every run: sample n of a run is a pure function of (seed, n)

    order            order/*.py           which tokens of which documents sample n has (data.order)
      |              reader.py            ranges of tokens by document, with checksums
    rows             train_stream.py      texts; records.py: one record a row; mixture.py: several
      |                                   folders; held_out.py: evaluation
    batch            batch.py             inputs, targets, documents, positions
      |              rank_share.py        the local rows, in micro-batches
      v              prefetch.py          the same, read ahead by worker processes
    train_step
"""
