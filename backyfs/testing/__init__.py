"""For authors of plug-ins: the suites that everything behind a waist must pass. Needs pytest.

Nothing of the program imports this package. See docs/plugins.md.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("backyfs.testing.source")
