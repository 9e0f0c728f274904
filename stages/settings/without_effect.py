"""Settings that change no row under the other settings, set to their defaults: so they make no new artifact."""

from stages.settings.data import DataSettings, FilterSettings, PrepareSettings

# A setting of the block `filter` that only counts if the other has a value that is not its default.
FILTER_NEEDS = {
    "language_column": "language",
    "near_duplicate_similarity": "duplicates",
    "decontaminate_words": "decontaminate",
}


def effective_data(data: DataSettings) -> DataSettings:
    """The block `data` without a seed that samples nothing, an empty map of columns, and the scale of the weights.

    Weights are relative to each other, and that of a single weighted source takes all of it.
    """
    sampled = any(source.weight or source.count for source in data.sources)
    total = sum(source.weight or 0.0 for source in data.sources)
    sources = [
        source.model_copy(
            update={
                "weight": source.weight and source.weight / total,
                "columns": source.columns or None,
                "labels": source.labels or None,
            }
        )
        for source in data.sources
    ]
    seed = data.seed if sampled else DataSettings().seed
    maps = {"columns": data.columns or None, "labels": data.labels or None}
    found = data.model_copy(update={**maps, "seed": seed, "sources": sources})
    # Each of several sources has a format and columns of its own.
    return found.model_copy(update={"format": "auto", "columns": None, "labels": None}) if sources else found


def effective_prepare(settings: PrepareSettings) -> PrepareSettings:
    """The block `prepare` without limits of a part that are not below the limit of the whole."""
    limits = {name: getattr(settings, name) for name in ("max_prompt_length", "max_completion_length")}
    unused = {
        name: None for name, limit in limits.items() if limit is not None and limit >= settings.max_length
    }
    return settings.model_copy(update=unused)


def effective_filter(settings: FilterSettings) -> FilterSettings:
    """The block `filter` without the details of filters that are off; a language without its case."""
    defaults = FilterSettings()
    unused = {
        name: getattr(defaults, name)
        for name, needed in FILTER_NEEDS.items()
        if getattr(settings, needed) == getattr(defaults, needed)
    }
    if settings.duplicates == "exact":
        unused["near_duplicate_similarity"] = defaults.near_duplicate_similarity
    if settings.language is not None:
        unused["language"] = settings.language.casefold()
    return settings.model_copy(update=unused)
