"""What `align compare` compares: the arguments, or the configuration's own completions, judged where there is a judge.

In: `Inputs` and paths. Out: a `Comparison`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import UsageError
from pipeline.judges import completions_of_run, judge_job, judge_kind, open_judge
from stages.compare.comparison import Compared, Comparison
from stages.compare.completions import Completed, completions_of, paired
from stages.compare.verdicts import Verdict, is_verdicts, outcomes, read_verdicts
from stages.judge.stage import find_verdicts
from stages.judge.stage import judge as make_verdicts

if TYPE_CHECKING:
    from pipeline.inputs import Inputs


def compare_paths(inputs: "Inputs", paths: Sequence[Path]) -> Comparison:
    """Compare each of `paths` with the first; none means the configuration's model with its baseline."""
    of_verdicts = [path for path in paths if is_verdicts(path)]
    if of_verdicts and len(of_verdicts) < len(paths):
        raise UsageError(
            f"{of_verdicts[0]} holds verdicts, which name their baseline. Give folders of verdicts alone, or completions alone."
        )
    if of_verdicts:
        return _of_verdicts(paths)
    if len(paths) == 1:
        raise UsageError(f"Only {paths[0]} is given. Give the baseline first, then what is compared with it.")
    if paths:
        baseline, *others = [completions_of(path) for path in paths]
    else:
        model, baseline = completions_of_run(inputs)
        others = [model]
    names = _names([baseline, *others], paths)
    models = [
        Compared.of(name, own, _verdicts(inputs, own, baseline))
        for name, own in zip(names[1:], others, strict=True)
    ]
    return Comparison(Compared.of(names[0], baseline), models)


def _verdicts(inputs: "Inputs", own: Sequence[Completed], baseline: Sequence[Completed]) -> list[Verdict]:
    """The verdicts of the configuration's judge; none without one."""
    if judge_kind(inputs) is None:
        return []
    job = judge_job(inputs, open_judge(inputs), paired(own, baseline))
    artifact = find_verdicts(job, inputs.context) or make_verdicts(job, inputs.context)
    return read_verdicts(artifact.path)


def _of_verdicts(paths: Sequence[Path]) -> Comparison:
    """Folders of verdicts against one baseline; raises `UsageError` where their baselines differ."""
    verdicts = [read_verdicts(path) for path in paths]
    pairs = [outcomes(own) for own in verdicts]
    baselines = [
        {(pair.baseline.asked, pair.baseline.sample_index): pair.baseline for pair in own} for own in pairs
    ]
    for path, own in zip(paths, baselines, strict=True):
        if own != baselines[0]:
            raise UsageError(f"{path} has another baseline than {paths[0]}. Compare them one by one.")
    baseline = list(baselines[0].values())
    models = [[pair.completion for pair in own] for own in pairs]
    names = _names([baseline, *models], [])
    return Comparison(
        Compared.of(names[0], baseline),
        [Compared.of(*one) for one in zip(names[1:], models, verdicts, strict=True)],
    )


def _names(files: Sequence[Sequence[Completed]], paths: Sequence[Path]) -> list[str]:
    """The models of these completions; where two are equal the files, or numbers."""
    names = [entries[0].model for entries in files]
    if len(set(names)) < len(names) and paths:
        names = [path.name for path in paths]
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[place] = f"{name} ({seen[name]})"
    return names
