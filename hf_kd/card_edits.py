"""What people write into a model card by hand, kept while the generated parts are replaced."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import yaml
from huggingface_hub import ModelCard, ModelCardData


BEGIN = "<!-- hf_kd:begin -->"
END = "<!-- hf_kd:end -->"


def parse(text: str) -> ModelCard | None:
    """A card's metadata and text; None if the metadata is no YAML."""
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError):
        return None


def outside(text: str) -> tuple[str, str] | None:
    """What stands before and after the generated part of a card's text; None if that part is not marked."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return None
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]


def written_by_hand(text: str) -> str:
    """The text of a card, without its metadata, that was not generated."""
    card = parse(text)
    body = text if card is None else card.text
    parts = outside(body)
    return (body if parts is None else "".join(parts)).strip()


def refresh(existing: str, metadata: ModelCardData, body: str, generated_tags: Collection[str]) -> str | None:
    """An existing card with the generated parts renewed, or None if it has no place for them.

    What stands between the two marks is replaced, and in the metadata the keys that the new one has. A model-index
    that the new one does not have goes, as one of an earlier run. A card of metadata alone, as the Hub makes it for a
    new repository, gets the text.

    Args:
        metadata, body: of the new card.
        generated_tags: tags that are an earlier card's, rather than somebody's, if the new card does not have them.
    """
    old = parse(existing)
    if old is None:
        return None
    parts = outside(old.text) if old.text.strip() else ("\n", "\n")
    if parts is None:
        return None
    data = cast(ModelCardData, old.data)
    data.eval_results, data.model_name = metadata.eval_results, metadata.model_name
    tags = list(metadata.tags or [])
    old_tags = [data.tags] if isinstance(data.tags, str) else data.tags or []
    tags += [tag for tag in old_tags if tag not in generated_tags and tag not in tags]
    for key, value in metadata.to_dict().items():
        if key != "model-index":
            data[key] = value
    data.tags = tags
    body = body.strip()
    old.text = parts[0] + (body.replace("\n", "\r\n") if "\r\n" in existing else body) + parts[1]
    return str(old)


def with_edits_of(base: str, edited: str, generated_keys: Collection[str]) -> str:
    """A card with what somebody has written by hand into another one: its text, and keys that are not generated."""
    card, other = parse(base), parse(edited)
    if card is None or other is None:
        return edited
    known = card.data.to_dict()
    changed = {
        key: value
        for key, value in other.data.to_dict().items()
        if key not in generated_keys and known.get(key) != value
    }
    for key, value in changed.items():
        card.data[key] = value
    by_hand = written_by_hand(edited)
    if by_hand:
        card.text = other.text
    return str(card) if changed or by_hand else base
