"""Every decoder-only architecture of transformers through the scoring engine, held against the model alone.

Out: `results/architectures.json` and `.md`. Run from the repository root:

    python benchmarks/architectures.py [KIND ...]
"""

import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

from cache.errors import AlignError
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute
from tests.stages.engine import tiny_architectures as tiny

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 4096)


def case(kind: str, feature: str, changes: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": f"{kind}/{feature}"}
    try:
        config = tiny.build_config(kind, **changes)
        model = tiny.build(config, tiny.TRUTH.get(f"{kind}/{feature}", "eager"))
        rows = tiny.make_rows()
        with torch.no_grad():
            truth = torch.cat([tiny.alone(model, rows, number) for number in range(len(rows))])
    except Exception as error:
        return row | {
            "way": "not built",
            "message": f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}",
        }
    said: list[str] = []
    began = time.perf_counter()
    try:
        scorer = Scorer(tiny.build(config, "sdpa"), FLOAT32, said.append)
        seconds = time.perf_counter() - began
        groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
        with torch.no_grad():
            found = scorer(build_pack(rows, groups)).completion_logps
            again = scorer(build_pack(rows, groups)).completion_logps
    except AlignError as error:
        return row | {"way": "refused", "message": str(error)}
    except Exception:
        return row | {"way": "CRASH", "message": traceback.format_exc()[-300:]}
    return row | {
        "way": _way(scorer.way),
        "difference": float((found.double() - truth).abs().max()),
        "again": float((found - again).abs().max()),
        "finite": bool(truth.isfinite().all()),
        "self_check_seconds": seconds,
        "message": "; ".join(said),
    }


def _way(way: Way) -> str:
    if way.backend is None:
        return "one by one"
    return "packed" if way.longest is None else f"packed up to {way.longest} tokens"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    import json

    rows = []
    for kind in sys.argv[2:] or tiny.KINDS:
        if kind in tiny.NOT_BUILT:
            rows.append({"name": kind, "way": "not built", "message": tiny.NOT_BUILT[kind]})
            continue
        for feature, changes in tiny.features(kind).items():
            rows.append(case(kind, feature, changes))
            print(json.dumps(rows[-1]), flush=True)
    json.dump(rows, open(sys.argv[1], "w"), indent=1)


if __name__ == "__main__":
    main()
