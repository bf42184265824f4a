"""Images: the reference domain of the core."""

from pathlib import Path

from shared.runs import register_pretrained

register_pretrained(Path(__file__).parent / "pretrained")
