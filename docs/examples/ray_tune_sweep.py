"""Ray Tune runs trainings on many GPUs and machines; the store is on a file system that all of them see.

python docs/examples/ray_tune_sweep.py mine.yaml /shared/artifacts 20
"""

import sys
from pathlib import Path
from typing import Any

import ray.tune

from pipeline.config import load_config
from pipeline.session import Session


def search(config: Path, store: Path, trials: int, gpus: float) -> ray.tune.ResultGrid:
    """Maximize the held-out accuracy; each trial has `gpus` GPUs."""
    config, store = config.resolve(), store.resolve()
    session = Session(load_config([config], [], None), store)
    session.run("prepare")
    session.run("cache-ref")

    def training(chosen: dict[str, Any]) -> dict[str, float]:
        assignments = [f"{key}={value!r}" for key, value in chosen.items()]
        return Session(load_config([config], assignments, None), store).run("train").as_json()["final"]

    space = {
        "train.learning_rate": ray.tune.loguniform(3e-7, 3e-4),
        "loss.beta": ray.tune.loguniform(0.01, 1.0),
    }
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(training, {"cpu": 1, "gpu": gpus}),
        param_space=space,
        tune_config=ray.tune.TuneConfig(metric="rewards/accuracies", mode="max", num_samples=trials),
    )
    return tuner.fit()


if __name__ == "__main__":
    best = search(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), gpus=1).get_best_result()
    print(best.metrics, best.config)
