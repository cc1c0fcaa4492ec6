"""Checkpoints: written by all ranks, read by any number of them, never unpickled.

    save    resume.save -> background.BackgroundSave (a thread) -> save_load.save_checkpoint
            -> DCP plans who writes what -> dcp_storage.PieceWriter (rank<N>.bin, hashed pieces)
            -> index.write_index -> commit marker, rename
    load    resume.resume -> folders.committed (newest first) -> save_load.load_tensors
            -> index.read_index -> DCP plans who reads what -> dcp_storage.PieceReader
            -> hashed_pieces.read_pieces (compared with their hashes) -> engine.restore

A model without a run comes through load_model -> open_checkpoint -> memmap. init_from and grow load
into a model that has new memory layers, or more keys.
"""
