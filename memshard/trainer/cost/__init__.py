"""Compute what a run will take, in closed form, before anything is allocated.

    division         how a recipe's work is divided over ranks
    parameters       how many parameters, of which kind
    layout_choice    how its tables are split, and why
    bytes            what a rank stores: `activations`, `dense_bytes`, and tables
    traffic          what a rank sends
    operations       what a token computes
    estimate         all of it together: what `memshard plan` and the opening screen show

    step_time        seconds of a step on one of `devices`, or on `this_machine`
    alternatives     other settings that fit, and the fastest of them
    dry_run          one rank of many, built in this process on meta tensors

Each kind describes its part: a table layout in `parallel/tables/layouts.py`, a mixer in
`models/mixers/kinds.py`, memories in `models/memory/kinds.py` and `models/ngram/kinds.py`, a
dense optimizer in `trainer/optim/dense/kinds.py`.
"""
