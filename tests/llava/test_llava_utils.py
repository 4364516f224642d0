"""The helpers that evaluation and serving scripts import."""

from __future__ import annotations

import asyncio
import io
import logging
import sys

import pytest
import requests
import torch

from llava import legacy, utils


@pytest.fixture
def fresh_logger():
    name = "a logger of these tests"
    yield name
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_disable_torch_init_leaves_layers_initialised():
    before = (torch.nn.Linear.reset_parameters, torch.nn.LayerNorm.reset_parameters)
    utils.disable_torch_init()
    assert (torch.nn.Linear.reset_parameters, torch.nn.LayerNorm.reset_parameters) == before


def test_build_logger_writes_to_its_file_once(tmp_path, monkeypatch, fresh_logger):
    monkeypatch.setattr(legacy, "LOGDIR", str(tmp_path / "logs"))
    stdout, stderr = sys.stdout, sys.stderr
    utils.build_logger(fresh_logger, "serve.log")
    logger = utils.build_logger(fresh_logger, "serve.log")
    logger.info("the model is ready")
    assert (tmp_path / "logs" / "serve.log").read_text().count("the model is ready") == 1
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def test_stream_to_logger_logs_whole_lines():
    text = io.StringIO()
    logger = logging.Logger("lines")
    logger.addHandler(logging.StreamHandler(text))
    stream = utils.StreamToLogger(logger)
    print("one", "two", file=stream)
    stream.write("half a ")
    assert text.getvalue() == "one two\n"
    stream.write("line\nrest")
    stream.flush()
    assert text.getvalue() == "one two\nhalf a line\nrest\n"


def test_semaphores_are_printed_with_their_state():
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(2)) == "Semaphore(value=2, locked=False)"


def test_moderation_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="OPENAI_API_KEY"):
        utils.violates_moderation("hello")


def test_moderation_passes_on_the_verdict_and_never_hides_a_failure(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    answer = requests.Response()

    def post(url, **kwargs):
        assert url.startswith("https://") and kwargs["timeout"] and kwargs.get("verify", True) is True
        assert kwargs["json"] == {"input": "hello"}
        return answer

    monkeypatch.setattr(requests, "post", post)
    answer.status_code, answer._content = 200, b'{"results": [{"flagged": true}]}'
    assert utils.violates_moderation("hello") is True
    answer.status_code = 500
    with pytest.raises(OSError):
        utils.violates_moderation("hello")


def test_messages_for_users_are_texts():
    assert utils.server_error_msg and utils.moderation_msg
