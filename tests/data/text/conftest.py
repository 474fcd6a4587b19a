import pytest


@pytest.fixture(autouse=True)
def needs_transformers():
    pytest.importorskip("transformers", reason="needs the extra text: pip install tenzoo[text]")
