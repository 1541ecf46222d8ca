"""Settings are refused as users meet them."""

from tests.methods.conftest import without_annotations  # noqa: F401
