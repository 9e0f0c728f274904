"""Optuna chooses learning rate and beta; every trial is a policy in the store, trained on one set of reference log-probs.

    python docs/examples/optuna_sweep.py mine.yaml artifacts 20

More processes or machines may run the same line with a study in a database (`storage=`): they share the store.
"""

import sys
from pathlib import Path

import optuna

from pipeline.config import load_config
from pipeline.session import Session


def search(config: Path, store: Path, trials: int) -> optuna.Study:
    """Maximize the held-out accuracy; the study's best parameters are configuration keys."""
    session = Session(load_config([config], [], None), store)
    session.run("prepare")
    session.run("cache-ref")

    def objective(trial: optuna.Trial) -> float:
        chosen = {
            "train.learning_rate": trial.suggest_float("train.learning_rate", 3e-7, 3e-4, log=True),
            "loss.beta": trial.suggest_float("loss.beta", 0.01, 1.0, log=True),
        }
        assignments = [f"{key}={value!r}" for key, value in chosen.items()]
        result = Session(load_config([config], assignments, None), store).run("train").as_json()
        trial.set_user_attr("artifact", result["artifact"])
        return result["final"]["rewards/accuracies"]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    best = search(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).best_trial
    print(best.value, best.params, best.user_attrs["artifact"])
