"""The delta rule, forward and backward, beside the chunked torch code of transformers and of
flash-linear-attention and a loop over steps.

    OMP_NUM_THREADS=1 python -m memshard.bench.fast_weights

Medians of interleaved runs on one thread, of processor time, and ratios to ours; then the memory
that autograd keeps. All get sum-normalised ELU + 1 features. Competitors are left out where they
are not installed: pip install transformers, and pip install --no-deps fla-core (its dependencies
want a GPU).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.bench.common.side_by_side import Function, check_equal, measure, table
from memshard.experiments.fast_weights.retrieval import Retriever, draw
from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.feature_maps import FeatureMap

SHAPES = {
    "medium language model": (2, 8, 384, 32),
    "2,048 tokens": (1, 4, 2048, 64),
    "8,192 tokens": (1, 4, 8192, 64),
}
_LONGEST_LOOP = 2048


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rules: dict[str, Function] = {
        "ours": lambda *x: delta_rule(*x)[0],
        **_competitors(),
        "loop over steps": _loop,
    }
    result: dict[str, Any] = {"torch": torch.__version__, "runs": args.runs}
    for title, shape in SHAPES.items():
        inputs = _inputs(*shape)
        chosen = {
            name: rule
            for name, rule in rules.items()
            if name != "loop over steps" or shape[2] <= _LONGEST_LOOP
        }
        check_equal(chosen, inputs, 1e-3, 1e-4)
        result[title] = measure(chosen, inputs, args.runs)
        print(f"{title} (batch, heads, length, width of a head: {shape})")
        print(table(result[title]))
    for symbols in (20, 100):
        title = f"training of retrieval, setting 2, {symbols} keys"
        steps, parameters = _retrieval(symbols)
        check_equal(steps, parameters, 1e-3, 1e-4)
        result[title] = measure(steps, parameters, args.runs)
        print(f"{title} (32 sequences of {2 * symbols} pairs, DPFP-1)")
        print(table(result[title]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _inputs(batch: int, heads: int, length: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    features = FeatureMap("elu", dim)
    q, k = (features(torch.randn(batch, heads, length, dim)) for _ in range(2))
    v, beta = torch.randn(batch, heads, length, dim), torch.rand(batch, heads, length)
    return [x.requires_grad_() for x in (q, k, v, beta)]


def _retrieval(symbols: int) -> tuple[dict[str, Function], list[Tensor]]:
    """Readings of a batch of the retrieval task by its model and by the same with a memory written
    step by step; the parameters.
    """
    torch.manual_seed(0)
    model = Retriever(symbols, "dpfp-1", "delta")
    keys, values = draw(
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


def _competitors() -> dict[str, Function]:
    found: dict[str, Function] = {}
    # On a machine without a GPU, transformers must not find flash-linear-attention, whose kernels
    # it would then call.
    hidden = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "fla"
    }
    sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        def transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
            # Its layout is [batch, length, heads, width]; it divides queries by the root of their
            # width.
            q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** 0.5, k, v))
            beta = beta.transpose(1, 2)
            out = torch_chunk_gated_delta_rule(
                q, k, v, g=torch.zeros_like(beta), beta=beta, chunk_size=64
            )[0]
            return out.transpose(1, 2)

        found["transformers, chunked"] = transformers
    except ImportError:
        print("transformers is not installed: left out")
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
        found["flash-linear-attention, naive"] = lambda q, k, v, beta: chunkwise(
            q * q.shape[-1] ** 0.5, k, v, beta
        )[0]
    except (importlib.metadata.PackageNotFoundError, ImportError):
        print("flash-linear-attention is not installed: left out")
    return found


def _loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for query, key, value, strength in zip(
        *(x.unbind(2) for x in (q, k, v)), beta.unbind(2), strict=True
    ):
        error = value - (key[..., None, :] @ state).squeeze(-2)
        state = state + key[..., None] * (strength[..., None] * error)[..., None, :]
        out.append((query[..., None, :] @ state).squeeze(-2))
    return torch.stack(out, 2)


if __name__ == "__main__":
    main()
