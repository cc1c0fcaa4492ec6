"""The delta rule, forward and backward, against the chunked torch code of transformers and of
flash-linear-attention and a loop over steps.

    OMP_NUM_THREADS=1 memshard bench fast-weights

Medians of interleaved rounds on one thread, in processor time, and ratios to ours; then the memory
that autograd keeps. All get sum-normalised ELU + 1 features. Competitors that are not installed are
left out: pip install transformers, and pip install --no-deps fla-core (its dependencies want a
GPU).
"""

import argparse
import importlib.metadata
import importlib.util
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.bench.common.side_by_side import Function, check_equal, measure, table
from memshard.experiments.fast_weights.retrieval import Retriever, sample_pairs
from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.feature_maps import FeatureMap

SHAPES = {
    "medium language model": (2, 8, 384, 32),
    "2,048 tokens": (1, 4, 2048, 64),
    "8,192 tokens": (1, 4, 8192, 64),
}
_LONGEST_LOOP = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds whose median counts (default 7)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the rule alone at several lengths, then training steps of the retrieval task."""
    torch.set_num_threads(1)
    competitors, missing = _competitors()
    rules: dict[str, Function] = {
        "ours": lambda *x: delta_rule(*x)[0],
        **competitors,
        "loop over steps": _loop,
    }
    tables = {}
    for title, shape in SHAPES.items():
        inputs = _inputs(*shape)
        compared = {
            name: rule
            for name, rule in rules.items()
            if name != "loop over steps" or shape[2] <= _LONGEST_LOOP
        }
        check_equal(compared, inputs, 1e-3, 1e-4)
        tables[f"{title} (batch, heads, length, width of a head: {shape})"] = measure(
            compared, inputs, args.rounds
        )
    for symbols in (20, 100):
        title = f"training of retrieval, setting 2, {symbols} keys"
        steps, parameters = _retrieval(symbols)
        check_equal(steps, parameters, 1e-3, 1e-4)
        tables[f"{title} (32 sequences of {2 * symbols} pairs, DPFP-1)"] = measure(
            steps, parameters, args.rounds
        )
    return {
        "torch": torch.__version__,
        "rounds": args.rounds,
        "missing": missing,
        "tables": tables,
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for each task."""
    for title, rows in result["tables"].items():
        print(title)
        print(table(rows))
    for name in result["missing"]:
        print(f"{name} is not installed: left out")


def _inputs(batch: int, heads: int, length: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    features = FeatureMap("elu", dim)
    q, k = (features(torch.randn(batch, heads, length, dim)) for _ in range(2))
    v, beta = torch.randn(batch, heads, length, dim), torch.rand(batch, heads, length)
    return [x.requires_grad_() for x in (q, k, v, beta)]


def _retrieval(symbols: int) -> tuple[dict[str, Function], list[Tensor]]:
    """Return two functions that read a batch of the retrieval task, by its model and by the same
    model with a memory written step by step, and the parameters of both.
    """
    torch.manual_seed(0)
    model = Retriever(symbols, "dpfp-1", "delta")
    keys, values = sample_pairs(
        symbols, 2 * symbols, 32, replace=True, random=torch.Generator().manual_seed(0)
    )
    queries = keys[:, :1]

    def by_steps(*_: Tensor) -> Tensor:
        k, q = model.keys_and_queries(keys, values, queries)
        beta, v = model.strengths(keys, values), F.one_hot(values, symbols).to(k.dtype)
        memory = k.new_zeros(len(k), k.shape[-1], symbols)
        for key, value, strength in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
            error = value - (key[:, None] @ memory).squeeze(1)
            memory = memory + key[..., None] * (strength[:, None] * error)[:, None]
        return q @ memory

    return {"ours": lambda *_: model(keys, values, queries), "loop over steps": by_steps}, list(
        model.parameters()
    )


def _competitors() -> tuple[dict[str, Function], list[str]]:
    """Return the competitors that are installed, and the names of the others."""
    rules: dict[str, Function] = {}
    missing = []
    # On a machine without a GPU, transformers must not find flash-linear-attention, whose kernels
    # it would then call.
    hidden = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "fla"
    }
    sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        def transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
            # Its layout is [batch, length, heads, width]; it divides queries by the root
            # of their width.
            q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** 0.5, k, v))
            beta = beta.transpose(1, 2)
            out = torch_chunk_gated_delta_rule(
                q, k, v, g=torch.zeros_like(beta), beta=beta, chunk_size=64
            )[0]
            return out.transpose(1, 2)

        rules["transformers, chunked"] = transformers
    except ImportError:
        missing.append("transformers")
    finally:
        del sys.modules["fla"]
        sys.modules.update(hidden)
    try:
        files = importlib.metadata.files("fla-core") or []
        source = next(file for file in files if str(file) == "fla/ops/delta_rule/naive.py").locate()
        spec = importlib.util.spec_from_file_location("fla_naive", str(source))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        chunkwise = module.delta_rule_chunkwise
        rules["flash-linear-attention, naive"] = lambda q, k, v, beta: chunkwise(
            q * q.shape[-1] ** 0.5, k, v, beta
        )[0]
    except (importlib.metadata.PackageNotFoundError, ImportError):
        missing.append("flash-linear-attention")
    return rules, missing


def _loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for query, key, value, strength in zip(
        *(x.unbind(2) for x in (q, k, v)), beta.unbind(2), strict=True
    ):
        error = value - (key[..., None, :] @ state).squeeze(-2)
        state = state + key[..., None] * (strength[..., None] * error)[..., None, :]
        out.append((query[..., None, :] @ state).squeeze(-2))
    return torch.stack(out, 2)
