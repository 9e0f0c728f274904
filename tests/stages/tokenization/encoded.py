"""Preferences rendered and encoded in one go, for tests."""

from stages.data.source_row import BadRow
from stages.formats import Preference
from stages.tokenization.encode import Encoded
from stages.tokenization.template import Template


def encode_all(template: Template, *preferences: Preference) -> list[Encoded | BadRow]:
    """As `prepare` does it for a batch."""
    encoder = template.encoder
    batch = encoder.texts_of([template.renderer.render(preference) for preference in preferences])
    return encoder.encoded(batch, encoder.tokenize(batch.texts))
