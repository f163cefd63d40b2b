"""What made a folder is written into it, and no secret of who made it."""

import json
import sys

from openpi.shared import run_metadata


def test_the_command_is_told_without_keys_logins_and_signatures(tmp_path, monkeypatch):
    command = [
        *("positronic-inference", "sim", "--policy=.remote", "--policy.api_key=s3cret", "--api-key", "s3cret"),
        *("--hub-token", "s3cret", "wss://robot:s3cret@host:8000/api?codec.fps=10"),
        "--from=https://bucket/episodes.tar?X-Amz-Date=2026&X-Amz-Signature=s3cret&sig=s3cret",
        *("--tokenizer=paligemma", "--image-key", "cam_high"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    text = run_metadata.write(tmp_path, {}).read_text()
    assert "s3cret" not in text
    assert json.loads(text)["command"] == [
        *("positronic-inference", "sim", "--policy=.remote", "--policy.api_key=***", "--api-key", "***"),
        *("--hub-token", "***", "wss://***@host:8000/api?codec.fps=10"),
        "--from=https://bucket/episodes.tar?X-Amz-Date=2026&X-Amz-Signature=***&sig=***",
        *("--tokenizer=paligemma", "--image-key", "cam_high"),
    ]
