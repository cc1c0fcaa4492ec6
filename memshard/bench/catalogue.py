"""The benchmarks that `memshard bench` knows. Importing this file does not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    module: import path of a file with `add_arguments(parser)`, `run(args) -> dict` (what JSON
    shows) and `show(result)` (prints that for people). measures: one line.
    """

    name: str
    module: str
    measures: str


def _benchmark(name: str, measures: str, module: str = "") -> Benchmark:
    return Benchmark(name, f"memshard.bench.{module or name.replace('-', '_')}", measures)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _benchmark(
            "values",
            "a training step of the value table and of whole memory layers, against torch, FBGEMM, "
            "product-key-memory and PEER-pytorch",
            "values.run",
        ),
        _benchmark(
            "values-gpu",
            "table reads and row updates on a GPU, as shares of the bandwidth of a copy",
            "values.gpu",
        ),
        _benchmark(
            "gpu",
            "a GPU in minutes: kernels, twins of every configuration, waits, bandwidths, MFU, "
            "a memory against twice the depth, in one file",
            "gpu.run",
        ),
        _benchmark("product-topk", "product-key search: what tie order costs and pruning saves"),
        _benchmark(
            "ngram-hash",
            "rows of n-grams against the public references: whether they agree, and times",
        ),
        _benchmark(
            "ngram", "training steps and forward passes with n-gram memories against without"
        ),
        _benchmark("lsh", "LSH attention on long sequences: time and memory, against its peers"),
        _benchmark("million-tokens", "one training step on a million tokens: time and memory"),
        _benchmark("reversible", "plain, checkpointed and reversible blocks: time and memory"),
        _benchmark(
            "fast-weights", "the delta rule against transformers, fla and a loop over steps"
        ),
        _benchmark("primer", "Primer's convolution and squared ReLU against torch's operations"),
        _benchmark("plan-memory", "the memory that `memshard plan` predicts against what is taken"),
        _benchmark(
            "parallel",
            "training steps at every (tensor, data) split of some ranks and on each engine, and a "
            "block against DTensor's",
        ),
        _benchmark("plain-loop", "`memshard train` against a plain training loop, on one process"),
        _benchmark("against", "training steps of this checkout against another one's, in turns"),
        _benchmark("data", "web pages a second by stage, tokenizers, tokens a second of a stream"),
        _benchmark("duplicates", "memory and time of finding the duplicates of many documents"),
        _benchmark("extraction", "main-text extraction against gold article bodies: F1 and speed"),
        _benchmark("export", "memory and speed of exporting and evaluating a large table on disk"),
        _benchmark("candidates", "programs a second that a search proposes and checks on one core"),
    )
}
