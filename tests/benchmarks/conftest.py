"""With --import-mode=importlib pytest leaves sys.path alone, and the tests here share `synthetic`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
