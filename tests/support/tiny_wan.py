"""The clips, prompts and measurements of the miniatures, `scripts/tiny_wan_data.py`."""

import importlib.util
import sys

from tests.support.videos import ROOT

_SPEC = importlib.util.spec_from_file_location("tiny_wan_data", ROOT / "scripts" / "tiny_wan_data.py")
assert _SPEC and _SPEC.loader
data = importlib.util.module_from_spec(_SPEC)
sys.modules["tiny_wan_data"] = data  # where its dataclasses look for it
_SPEC.loader.exec_module(data)
