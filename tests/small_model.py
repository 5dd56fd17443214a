"""The model that most tests draw with: trained, of 64×64 pixels, and quicker than the one that comes with fastsd."""

from pathlib import Path

SMALL_MODEL = Path(__file__).parent / "data" / "shapes-64"
