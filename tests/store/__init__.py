"""Tests of the store. Assertions in these helpers explain themselves as those in tests do."""

import pytest

pytest.register_assert_rewrite("tests.store.contract")
