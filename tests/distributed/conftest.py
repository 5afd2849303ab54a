"""What short real runs need, made once for each test session."""

import pytest

from tests import chat, text_run
from tests import stock as stock_model
from tests.chat import ChatRun
from tests.stock import Stock
from tests.text_run import TextRun


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextRun:
    """Three domains of real text and a checkpoint to start from; do not change them."""
    return text_run.make(tmp_path_factory.getbasetemp() / "text_run")


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """A model as a checkpoint and as a Hugging Face directory; do not change them."""
    return stock_model.make(tmp_path_factory.getbasetemp() / "stock")


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> ChatRun:
    """A made-up chat set and a checkpoint to start from; do not change them."""
    return chat.make(tmp_path_factory.getbasetemp() / "chat_run")
