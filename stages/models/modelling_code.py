"""The import of transformers' modelling code, without the one of scikit-learn that comes with it.

transformers imports scikit-learn where it is installed, and with it SciPy's statistics, for a threshold in assisted
generation, which no stage uses: a second of processor time before a command begins.
"""

import sys

WITH_SKLEARN = "transformers.generation.candidate_generator"


def import_modelling_code() -> None:
    """Import what would import scikit-learn while transformers takes that for absent; without effect a second time."""
    if WITH_SKLEARN in sys.modules:
        return
    from transformers import utils

    available = utils.is_sklearn_available
    utils.is_sklearn_available = lambda: False
    try:
        import transformers.generation.candidate_generator  # noqa: F401
    finally:
        utils.is_sklearn_available = available
