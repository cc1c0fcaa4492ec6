"""Every configuration that a GPU has to train as a CPU does, as changes of one tiny recipe."""

RECIPE = """\
data: {{path: {data}, length: 32}}
model:
  layers: 2
  dim: 16
  mixer: {{heads: 2}}
  memory: {{layers: [0, 1], share: true, keys: 8, heads: 2, topk: 3, key_dim: 8}}
  dropout: 0.1
train: {{steps: 10, batch: 8, log_every: 1, eval_every: 0, save_every: 1000}}
optimizer: {{lr: 1e-2, schedule: constant, warmup: 3}}
"""
"""All that could go wrong on resume at once: dropout, batch statistics, a shared table, and (with
the data of the tests) an epoch of 8 steps.
"""

_LSH = ("model.mixer.kind=lsh", "model.mixer.chunk=8", "model.mixer.buckets=4")
_DELTA = ("model.mixer.kind=delta", "model.position=none")
MAIN = {
    "plain": (),
    "micro-batches": ("train.micro_batch=2", "tables.clip=1.0", "tables.semantics=catch-up"),
    "stochastic": ("tables.dtype=bf16", "tables.rounding=stochastic", "tables.semantics=row-step"),
    "host": ("tables.place=host", "tables.dtype=fp16"),
    "peer": ("model.memory.kind=peer", "model.memory.query_norm=rms"),
    "lsh": (*_LSH, "model.residual=reversible", "model.memory.query_norm=lagged"),
    "delta": (*_DELTA, "train.carry_state=true", "data.document_mask=true"),
    "n-grams": (
        "model.ngram.layers=[0,1]",
        "model.ngram.rows=50",
        "model.ngram.heads=2",
        "model.ngram.value_dim=4",
        "data.document_mask=true",
    ),
}
"""The ones that differ most."""
OTHERS = {
    "fp16": ("train.precision=fp16", "tables.dtype=fp16"),
    "gate": ("model.memory.gate=true", "model.memory.value_dim=24"),
    "revive": ("tables.revive=true", "tables.dead_after=1", "train.key_balance=0.01"),
    "dense steps": ("tables.semantics=dense",),
    "swiglu": (
        "model.position=rotary",
        "model.norm=rms",
        "model.feedforward.activation=swiglu",
        "model.mixer.kv_heads=1",
    ),
    "axial": ("model.position=axial",),
    "sinusoidal": ("model.position=sinusoidal", "model.memory.weighting=sigmoid"),
    "published lsh": (*_LSH, "model.mixer.rule=hf_compat", "model.mixer.heads_at_once=1"),
    "causal lsh": (*_LSH, "model.mixer.rule=paper_causal"),
    "local": ("model.mixer.kind=local", "model.mixer.window=8", "data.document_mask=true"),
    "linear": ("model.mixer.kind=linear", "train.segments=2", "model.position=none"),
    "favor": (
        "model.mixer.kind=linear",
        "model.mixer.features=favor",
        "model.mixer.feature_width=16",
    ),
    "dpfp": (*_DELTA, "model.mixer.features=dpfp", "model.mixer.attention_norm=true"),
    "check inversion": ("model.residual=reversible", "train.check_inversion=true"),
    "primer": (
        "model.mixer.convolution=3",
        "model.mixer.share_qk=true",
        "model.feedforward.activation=squared_relu",
        "model.norm=primer",
    ),
    "host, shared": ("tables.place=host", "train.micro_batch=4", "tables.clip=1.0"),
    "host, dense steps": ("tables.place=host", "tables.semantics=dense"),
    "host, revive": ("tables.place=host", "tables.revive=true", "tables.dead_after=1"),
    "adaptive": (
        "model.tie_head=false",
        "model.adaptive_cutoffs=[64,256]",
        "model.adaptive_division=2",
    ),
    "smoothing": (
        "train.label_smoothing=0.1",
        "train.chunk=16",
        "model.memory.query_norm=lagged",
    ),
    "checkpointing": ("train.checkpointing=full", "model.memory.kind=peer", "tables.place=host"),
    "selective": ("train.checkpointing=selective",),
    "masked tokens": ("model.encoder_layers=2",),
    "added": ("model.memory.mode=add", "model.residual=post"),
    "no memory": ("model.memory.layers=[]",),
}
CONFIGURATIONS = MAIN | OTHERS
