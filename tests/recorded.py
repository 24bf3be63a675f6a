"""The recorded requests and measured iteration times beside the repository: where they are, and who needs them."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
DATA = SHARED / "data"

recorded = pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded data beside the repository")
