"""What of an evaluation was already seen in pretraining: by the salted digests that travel with an encoder."""

import json
from pathlib import Path

from ssl_dist.eval.features import Split
from ssl_dist.models import encoder as encoders


def overlap(encoder: str, query: Split) -> dict[str, int] | None:
    """How many of the query's tiles, slides and patients the encoder was trained on; None where it does not say."""
    return seen(encoder, {"tiles": [digest.hex() for digest in query.reader.column("digest", query.rows)],
                          "slides": query.reader.column("slide", query.rows), "patients": query.patients})


def seen(encoder: str, words: dict[str, list[str]]) -> dict[str, int] | None:
    """How many of some tiles (by their digests), slides or patients the encoder was trained on; of slides and patients
    each counts once, and one without a name not at all."""
    try:
        facts = json.loads((Path(encoder) / "pretraining.json").read_text(encoding="utf-8"))
        salt, kinds = facts["salt"], {name: set(facts[name]) for name in words}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    once = {name: each if name == "tiles" else sorted(set(each) - {""}) for name, each in words.items()}
    return {name: sum(encoders.salted(salt, word) in kinds[name] for word in each) for name, each in once.items()}
